# `nix develop`: the programs that setup/debian-packages.txt names on Debian, for a machine that has Nix and no apt.
# `setup/prepare` then makes the Python environment from requirements.lock, as everywhere.
# (The demo's and the tests' virtual machines are made of Debian's packages: those need apt even so.)
{
  description = "toto, the deployment server of a NixOS fleet: a shell to work on it";

  inputs.nixpkgs.url = "nixpkgs/nixos-24.11"; # by way of the flake registry

  outputs = { self, nixpkgs }:
    let
      inherit (nixpkgs) lib;
      systems = [ "x86_64-linux" "aarch64-linux" ];
      packages = system: import nixpkgs {
        inherit system;
        config.allowUnfreePredicate = package: lib.getName package == "terraform";
      };
    in
    {
      devShells = lib.genAttrs systems (system:
        let
          pkgs = packages system;
          # The program alone: its applets would come before the real ones.
          busybox = pkgs.runCommand "busybox-alone" { } ''
            mkdir -p $out/bin
            ln -s ${lib.getExe pkgs.pkgsStatic.busybox} $out/bin/busybox
          '';
        in
        {
          default = pkgs.mkShell {
            packages = [ busybox ] ++ (with pkgs; [
              # building
              nix
              python312
              git
              gnumake
              xz
              # the virtual machines of the rehearsal and of the lab
              qemu
              squashfsTools
              e2fsprogs
              cpio
              kmod
              # reaching them, and the post-receive hook
              openssh
              curl
              util-linux
              # what toto deploys besides hosts, and what its tests deploy it to
              terraform
              kubernetes-helm
              etcd
              # toto's own database
              postgresql
              # what some tests look with
              iproute2
              procps
            ]);
            # The wheels of requirements.lock are built for a distribution with these in /usr/lib.
            LD_LIBRARY_PATH = lib.makeLibraryPath [ pkgs.stdenv.cc.cc.lib pkgs.zlib ];
            PYTHON = lib.getExe pkgs.python312;
          };
        });
    };
}
