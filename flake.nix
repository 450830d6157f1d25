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
            if [ ! -x .venv/bin/python ]; then
              uv venv --python "$(command -v python3.12)" .venv
            fi
            # shellcheck disable=SC1091
            . .venv/bin/activate
            if ! python -c 'import cllm' 2>/dev/null; then
              uv pip install -e '.[test]'
            fi
          '';
        };
    in
    {
      devShells = nixpkgs.lib.genAttrs systems (system: { default = shell system; });
    };
}
