# nixosModules.toto: the server, on NixOS (docs/operations.md). packages.SYSTEM.toto: its package.
# nixosModules.flying-monkey: a machine's side (docs/flying-monkey.md).
# nixosModules.monitoring: Prometheus, Alertmanager and Grafana for both (docs/monitoring.md).
# nixosModules.store: what machines fetch from toto by NFS (docs/store.md).
#
# `nix develop`: the programs that setup/debian-packages.txt names on Debian, for a machine that has Nix and no apt.
# `setup/prepare` then makes the Python environment from requirements.lock, as everywhere.
# (The demo's and the tests' virtual machines are made of Debian's packages: those need apt even so.)
{
  description = "toto, the deployment server of a NixOS fleet";

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
      nixosModules.toto = ./nix/toto.nix;
      nixosModules.flying-monkey = ./nix/flying-monkey.nix;
      nixosModules.monitoring = ./nix/monitoring.nix;
      nixosModules.store = ./nix/store.nix;
      nixosModules.default = ./nix/toto.nix;

      packages = lib.genAttrs systems (system: rec {
        toto = (packages system).callPackage ./nix/package.nix { };
        flying-monkey = (packages system).callPackage ./nix/flying-monkey-package.nix { };
        default = toto;
      });

      apps = lib.genAttrs systems (system: {
        default = { type = "app"; program = lib.getExe self.packages.${system}.toto; };
      });

      # `nix flake check` builds the packages, and runs the modules in virtual machines.
      checks = lib.genAttrs systems (system: {
        inherit (self.packages.${system}) toto flying-monkey;
        toto-in-a-machine = import ./nix/tests/toto.nix { pkgs = packages system; };
        flying-monkey-in-a-machine = import ./nix/tests/flying-monkey.nix { pkgs = packages system; };
      });

      devShells = lib.genAttrs systems (system:
        let
          pkgs = packages system;
          # The program alone: its applets would come before the real ones.
          busybox = pkgs.runCommand "busybox-alone" { } ''
            mkdir -p $out/bin
            ln -s ${lib.getExe' pkgs.pkgsStatic.busybox "busybox"} $out/bin/busybox
          '';
          # By its name on Debian.
          node-exporter = pkgs.runCommand "prometheus-node-exporter" { } ''
            mkdir -p $out/bin
            ln -s ${lib.getExe pkgs.prometheus-node-exporter} $out/bin/prometheus-node-exporter
          '';
        in
        {
          default = pkgs.mkShell {
            packages = [ busybox node-exporter ] ++ (with pkgs; [
              # building
              nix
              python312
              git
              gnumake
              xz
              # cells
              bubblewrap
              slirp4netns
              nftables
              iproute2
              util-linux
              # the virtual machines of the rehearsal and of the lab
              qemu
              squashfsTools
              e2fsprogs
              cpio
              kmod
              debootstrap
              # reaching them, and the post-receive hook
              openssh
              curl
              # what toto deploys besides hosts, and what its tests deploy it to
              terraform
              kubernetes-helm
              etcd
              nginx
              # toto's own database
              postgresql
              # what reads its figures
              prometheus
              prometheus.cli
              prometheus-alertmanager
              # a browser, for the page of the fleet
              chromium
              # login shells of machines' users
              fish
              zsh
              # what some tests look with
              procps
            ]);
            # The wheels of requirements.lock are built for a distribution with these in /usr/lib.
            LD_LIBRARY_PATH = lib.makeLibraryPath [ pkgs.stdenv.cc.cc.lib pkgs.zlib ];
            PYTHON = lib.getExe pkgs.python312;
          };
        });
    };
}
