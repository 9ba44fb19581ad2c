# system.build.vm: the run-NAME-vm script, with the same environment variables as that of NixOS's qemu-vm.nix.
#
# Disks: vda the machine's own (ext4, made when absent), vdb the squashfs of what all hosts share, vdc that of
# this host's closure. QEMU is the one on PATH: the lab does not carry one.
{ config, lib, pkgs, vmConfig, ... }:
let
  inherit (lib) mkOption types;
  cfg = config.virtualisation;
  name = config.system.name;
  toplevel = config.system.build.toplevel;

  # The part that all lab hosts share is packed once.
  shared = pkgs.build "lab-image-shared" { inherit (config.system.build) initrd; } ''
    ${pkgs.tool "mksquashfs"} ${pkgs.base} ${pkgs.kernel} ${pkgs.python3} $initrd image -no-progress -quiet \
      -noI -noD -noF -noX -all-root -no-xattrs -processors 1 -mkfs-time 1 -all-time 1
    mkdir $out
    mv image $out/image
  '';

  # The rest of the closure, and nix's database of all of it. The builder
  # gets its attributes as JSON, because only then does nix give it the hash and size of each path.
  own = derivation {
    name = "lab-image-${name}";
    inherit (pkgs) system;
    __structuredAttrs = true;
    builder = "${pkgs.tools}/bin/busybox";
    args = [ "sh" "-euc" ''
      export PATH=${pkgs.tools}/bin
      cd "$NIX_BUILD_TOP"
      out=$(sed -n 's/.*"outputs":{"out":"\([^"]*\)".*/\1/p' .attrs.json)
      # One line for each object of the closure's array: path, hash, size, references.
      sed 's/.*"closure":\[{//; s/}\].*//; s/},{/\n/g' .attrs.json | awk '
        function field(key) { return match($0, "\"" key "\":\"[^\"]*\"") ? substr($0, RSTART + length(key) + 4, RLENGTH - length(key) - 5) : "" }
        {
          match($0, /"narSize":[0-9]+/); size = substr($0, RSTART + 10, RLENGTH - 10)
          refs = ""; n = 0
          if (match($0, /"references":\[[^]]*\]/)) {
            list = substr($0, RSTART + 14, RLENGTH - 15); gsub(/"/, "", list)
            n = list == "" ? 0 : split(list, ref, ",")
            for (i = 1; i <= n; i++) refs = refs ref[i] "\n"
          }
          printf "%s\n%s\n%s\n\n%d\n%s", field("path"), field("narHash"), size, n, refs
          print field("path") > "paths"
        }' > registration
      mkdir -p "$out" tree
      grep -v -x -F -e ${pkgs.base} -e ${pkgs.kernel} -e ${pkgs.python3} -e ${config.system.build.initrd} paths > own
      # nix's database is made here: it takes a tenth of a second, and two on an emulated machine.
      NIX_STATE_DIR=$PWD/state NIX_LOG_DIR=$PWD/log NIX_REMOTE= NIX_CONFIG="build-users-group =" \
        ${pkgs.base}/lib64/ld-linux-x86-64.so.2 --library-path ${pkgs.base}/lib/x86_64-linux-gnu \
        ${pkgs.base}/bin/nix-store --load-db < registration
      mkdir tree/nix-db
      cp state/db/db.sqlite state/db/schema tree/nix-db/
      ${pkgs.tool "mksquashfs"} $(cat own) tree/nix-db image -no-progress -quiet \
        -noI -noD -noF -noX -all-root -no-xattrs -processors 1 -mkfs-time 1 -all-time 1
      mv image "$out/image"
    '' ];
    exportReferencesGraph.closure = [ toplevel ];
    preferLocalBuild = true;
    allowSubstitutes = false;
  };

  forwards = lib.concatMapStrings
    (f: "hostfwd=${f.proto or "tcp"}:${f.host.address or ""}:${toString f.host.port}-${f.guest.address or ""}:${toString f.guest.port},")
    (lib.filter (f: f.from or "host" == "host") cfg.forwardPorts);

  run = pkgs.writeTextFile {
    name = "run-${name}-vm";
    executable = true;
    destination = "/bin/run-${name}-vm";
    text = ''
      #!${pkgs.tools}/bin/busybox sh
      # The environment variables are those of NixOS's run-NAME-vm: NIX_DISK_IMAGE, TMPDIR, USE_TMPDIR, SHARED_DIR,
      # QEMU_NET_OPTS, QEMU_OPTS, QEMU_KERNEL_PARAMS; arguments go to QEMU last.
      set -e
      NIX_DISK_IMAGE=$(readlink -f "''${NIX_DISK_IMAGE:-${cfg.diskImage}}") || test -z "$NIX_DISK_IMAGE"

      if test -n "$NIX_DISK_IMAGE" && ! test -e "$NIX_DISK_IMAGE"; then
        echo "Disk image do not exist, creating the virtualisation disk image..." >&2
        # Made under a different name, so that an existing disk is complete.
        raw=$(mktemp "$NIX_DISK_IMAGE.XXXXXX")
        ${pkgs.tools}/bin/truncate -s ${toString cfg.diskSize}M "$raw"
        ${pkgs.tool "mke2fs"} -q -F -t ext4 -L nixos -I 256 -E lazy_itable_init=1,lazy_journal_init=1,nodiscard "$raw"
        qemu-img convert -q -f raw -O qcow2 "$raw" "$raw.qcow2"
        mv "$raw.qcow2" "$NIX_DISK_IMAGE"
        rm "$raw"
        echo "Virtualisation disk image created." >&2
      fi

      if [ -z "$TMPDIR" ] || [ -z "$USE_TMPDIR" ]; then
        TMPDIR=$(mktemp -d ''${TMPDIR:-/tmp}/nix-vm.XXXXXXXXXX)
      fi
      mkdir -p "$TMPDIR/xchg"
      cd "$TMPDIR"

      # Disks are cache=writeback: what the guest has flushed is on the host's disk, the rest may be lost.
      exec qemu-system-x86_64 \
        -machine accel=kvm:tcg -cpu max -global virtio-net-pci.romfile= \
        -name ${name} -m ${toString cfg.memorySize} -smp ${toString cfg.cores} \
        -net nic,netdev=user.0,model=virtio -netdev user,id=user.0,${forwards}"$QEMU_NET_OPTS" \
        -drive file="$NIX_DISK_IMAGE",if=virtio,format=qcow2,cache=writeback,werror=report \
        -drive file=${shared}/image,if=virtio,format=raw,readonly=on \
        -drive file=${own}/image,if=virtio,format=raw,readonly=on \
        -kernel ${toplevel}/kernel -initrd ${toplevel}/initrd \
        -append "$(cat ${toplevel}/kernel-params) init=${toplevel}/init $QEMU_KERNEL_PARAMS" \
        ${if cfg.graphics then "" else "-nographic"} \
        ${lib.escapeShellArgs cfg.qemu.options} \
        $QEMU_OPTS \
        "$@"
    '';
  };
in
{
  options = {
    virtualisation = {
      vmVariant = mkOption { type = types.deferredModule; default = { }; };
      memorySize = mkOption { type = types.ints.positive; default = 384; };
      cores = mkOption { type = types.ints.positive; default = 1; };
      diskSize = mkOption { type = types.ints.positive; default = 1024; };
      diskImage = mkOption { type = types.nullOr types.str; default = "./${name}.qcow2"; };
      graphics = mkOption { type = types.bool; default = false; };
      forwardPorts = mkOption { type = types.listOf types.anything; default = [ ]; };
      qemu.options = mkOption { type = types.listOf types.str; default = [ ]; };
      qemu._freeform = true;
    };
    system.build.vm = mkOption { type = types.package; };
    system.build.runVm = mkOption { type = types.package; };
  };
  config.system.build.runVm = run;
  config.system.build.vm = vmConfig.system.build.runVm;
}
