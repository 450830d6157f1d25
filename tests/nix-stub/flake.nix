# Stands in for nixpkgs where there is no network: just what ../../flake.nix asks of it, with every package an empty folder.
{
  outputs =
    { self }:
    let
      lib = {
        genAttrs = names: value: builtins.listToAttrs (map (name: { inherit name; value = value name; }) names);
        makeLibraryPath = packages: builtins.concatStringsSep ":" (map (package: "${package}/lib") packages);
      };
      packages =
        system:
        let
          build = name: attributes: derivation ({
            inherit name system;
            builder = "/bin/bash";
            args = [ "-c" "/bin/mkdir -p $out; exit 0" ];
            outputs = [ "out" ];
          } // attributes);
          empty = name: build name { };
        in
        {
          inherit lib;
          stdenv.cc.cc.lib = empty "gcc-lib";
          zlib = empty "zlib";
          python312 = empty "python312";
          uv = empty "uv";
          git = empty "git";
          mkShell = { packages, shellHook }: build "shell" { inherit shellHook; nativeBuildInputs = packages; };
        };
      systems = [ "x86_64-linux" "aarch64-linux" "aarch64-darwin" ];
    in
    {
      inherit lib;
      legacyPackages = lib.genAttrs systems packages;
    };
}
