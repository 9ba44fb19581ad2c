# The toplevel: everything that a machine needs from a configuration, at the paths that NixOS uses.
{ config, lib, pkgs, isVmVariant, ... }:
let
  inherit (lib) mkOption types;
  scripts = ../scripts;

  # Snippets run one after the other. One that fails is reported and noted, and the others still run.
  activationScripts = lib.concatStrings (lib.mapAttrsToList
    (name: snippet: ''
      #### ${name}
      _localstatus=0
      ( set -e
      ${snippet.text}
      ) || { _localstatus=$?; _status=1; echo "Activation script snippet '${name}' failed ($_localstatus)" >&2; }
    '')
    config.system.activationScripts);

  initrd = pkgs.build "initrd" { stage1 = "${scripts}/stage-1.sh"; } ''
    mkdir -p root/bin root/modules
    cp ${pkgs.tools}/bin/busybox root/bin/
    cp ${pkgs.kernel}/lib/modules/*/* root/modules/
    cp $stage1 root/init
    chmod +x root/init
    mkdir $out
    cd root
    find . -exec touch -h -d @1 {} +
    find . | sort | cpio -o -H newc -R 0:0 2>/dev/null | gzip -n -1 > $out/initrd
  '';
in
{
  options.system = {
    activationScripts = mkOption {
      default = { };
      type = types.attrsOf (types.either types.str (types.submodule {
        options = { _freeform = true; text = mkOption { type = types.lines; default = ""; }; };
      }));
      apply = lib.mapAttrs (_: snippet: if lib.isString snippet then { text = snippet; } else snippet);
    };
    switch.enable = mkOption { type = types.bool; default = true; };
    stateVersion = mkOption { type = types.str; default = "24.11"; };
    configurationRevision = mkOption { type = types.nullOr types.str; default = null; };
    name = mkOption { type = types.str; default = config.networking.hostName; };
    nixos = {
      _freeform = true;
      release = mkOption { type = types.str; default = "24.11"; };
      version = mkOption { type = types.str; default = "24.11.lab"; };
      label = mkOption { type = types.str; default = "24.11.lab"; };
      tags = mkOption { type = types.listOf types.str; default = [ ]; };
    };
    build.toplevel = mkOption { type = types.package; };
    build.initrd = mkOption { type = types.package; };
  };
  options.assertions = mkOption { type = types.listOf types.anything; default = [ ]; };
  options.warnings = mkOption { type = types.listOf types.str; default = [ ]; };

  config.system.build.initrd = initrd;
  config.system.build.toplevel =
    let failed = lib.filter (a: !a.assertion) config.assertions; in
    if failed != [ ] then throw "\nFailed assertions:\n${lib.concatMapStringsSep "\n" (a: "- ${a.message}") failed}"
    else pkgs.build "nixos-system-${config.system.name}-${config.system.nixos.label}"
      {
        inherit activationScripts;
        inherit (config.system.build) etc path initrd;
        inherit (pkgs) base kernel;
        version = config.system.nixos.version;
        configurationRevision = toString config.system.configurationRevision;
        passAsFile = [ "activationScripts" ];
      } ''
      mkdir -p $out/bin
      ln -s $etc/etc $out/etc
      ln -s $path $out/sw
      ln -s $base $out/usr
      ln -s $kernel/vmlinuz $out/kernel
      ln -s $kernel $out/kernel-modules
      ln -s $initrd/initrd $out/initrd
      printf %s "$version" > $out/nixos-version
      printf %s x86_64-linux > $out/system
      printf %s "console=ttyS0 panic=-1 loglevel=4" > $out/kernel-params
      [ -z "$configurationRevision" ] || printf %s "$configurationRevision" > $out/configuration-revision
      install() { sed "s|@out@|$out|g" "$1" > "$2"; chmod 555 "$2"; }
      install ${scripts}/init.sh $out/init
      ${lib.optionalString config.system.switch.enable
        "install ${scripts}/switch-to-configuration.sh $out/bin/switch-to-configuration"}
      { sed "s|@out@|$out|g" ${scripts}/activate.sh
        cat "$activationScriptsPath"
        sed "s|@out@|$out|g" ${scripts}/activate-end.sh; } > $out/activate
      chmod 555 $out/activate
    '';

  config.environment.systemPackages = [
    (pkgs.runCommand "lab-commands" { } ''
      mkdir -p $out/bin
      for name in systemctl systemd-run nixos-version; do
        cp ${scripts}/$name.sh $out/bin/$name
        chmod 555 $out/bin/$name
      done
    '')
  ];
  config.environment.etc.inittab.text = ''
    ::sysinit:/run/current-system/etc/lab/boot
    ::ctrlaltdel:/run/current-system/sw/bin/reboot
    ::shutdown:/run/current-system/etc/lab/shutdown
  '';
  config.environment.etc."lab/boot".source = "${scripts}/boot.sh";
  config.environment.etc."lab/shutdown".source = "${scripts}/shutdown.sh";
  config.environment.etc."lab/supervise".source = "${scripts}/supervise.sh";
}
