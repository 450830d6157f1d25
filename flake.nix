{
  description = "cllm: LoRA and QLoRA fine-tuning of Chinese language models on one 8 GB GPU";

  inputs.nixpkgs.url = "github:NixOS/nixpkgs/f5c082a40f7571c266e74e80ae2e68aadd8a9fc7"; # nixos-26.05

  outputs =
    { self, nixpkgs }:
    let
      systems = [ "x86_64-linux" "aarch64-linux" "aarch64-darwin" ];
      shell =
        system:
        let
          pkgs = nixpkgs.legacyPackages.${system};
          # Wheels bring CUDA's libraries but neither the C++ runtime nor the driver, which is the host's (NixOS, WSL).
          libraries = pkgs.lib.makeLibraryPath [ pkgs.stdenv.cc.cc.lib pkgs.zlib ];
        in
        pkgs.mkShell {
          packages = [ pkgs.python312 pkgs.uv pkgs.git ];
          shellHook = ''
            export UV_PYTHON_DOWNLOADS=never
            case "$(uname -s)" in
              Linux) export LD_LIBRARY_PATH="${libraries}:/run/opengl-driver/lib:/usr/lib/wsl/lib''${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}" ;;
            esac
            # .venv holds the wheels of requirements.lock; it is made anew when the lock changes.
            if [ -f requirements.lock ] && ! cmp -s requirements.lock .venv/requirements.lock; then
              uv venv --clear --python "$(command -v python3.12)" .venv &&
                uv pip install --python .venv --require-hashes -r requirements.lock &&
                uv pip install --python .venv -c constraints.txt -e '.[test]' &&
                cp requirements.lock .venv/requirements.lock
            fi
            if [ -f .venv/bin/activate ]; then
              # shellcheck disable=SC1091
              . .venv/bin/activate
            fi
          '';
        };
    in
    {
      devShells = nixpkgs.lib.genAttrs systems (system: { default = shell system; });
    };
}
