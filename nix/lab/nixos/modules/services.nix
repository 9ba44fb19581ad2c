# systemd.services, run by runit. Unit files are written as NixOS writes them, for tools that compare the units of two
# closures; runit executes the `run` script next to them, which is made from the same options.
{ config, lib, pkgs, ... }:
let
  inherit (lib) mkOption types;
  enabled = lib.filterAttrs (_: s: s.enable) config.systemd.services;
  quote = text: "\"${lib.replaceStrings [ "\\" "\"" ] [ "\\\\" "\\\"" ] text}\"";
  strip = command: lib.last (lib.match "([-@:+!]*)(.*)" command);
  commands = x: map strip (lib.flatten [ x ]);

  execStart = name: s:
    if s.script != "" then "${pkgs.writeShellScriptBin "${name}-start" "set -e\n${s.script}"}/bin/${name}-start"
    else lib.last (commands (s.serviceConfig.ExecStart or (throw
      "systemd.services.${name} has neither `script' nor `serviceConfig.ExecStart'")));

  line = key: value: lib.concatMapStrings
    (v: "${key}=${if v == true then "true" else if v == false then "false" else toString v}\n") (lib.flatten [ value ]);

  unit = name: s: ''
    [Unit]
    ${lib.optionalString (s.description != "") "Description=${s.description}"}
    ${lib.concatStrings (lib.mapAttrsToList line (lib.filterAttrs (_: v: v != [ ]) { After = s.after; Wants = s.wants; Requires = s.requires; }))}${lib.optionalString (s.restartTriggers != [ ]) "X-Restart-Triggers=${toString s.restartTriggers}"}

    [Service]
    ${lib.concatStrings (lib.mapAttrsToList (n: v: "Environment=${quote "${n}=${toString v}"}\n") s.environment)}${lib.concatStrings (lib.mapAttrsToList line (removeAttrs s.serviceConfig [ "ExecStart" ]))}ExecStart=${execStart name s}
  '';

  # A oneshot stays "up" after it has succeeded, as with RemainAfterExit.
  run = name: s:
    let
      sc = s.serviceConfig;
      oneshot = sc.Type or "simple" == "oneshot";
      start = lib.optionalString (sc ? User) "chpst -u ${sc.User}${lib.optionalString (sc ? Group) ":${sc.Group}"} " + execStart name s;
    in
    ''
      #!/bin/sh
      # ${toString s.restartTriggers}
      exec </dev/null 2>&1
      export PATH=${lib.concatMapStrings (p: "${p}/bin:") s.path}/run/current-system/sw/bin
      ${lib.concatStrings (lib.mapAttrsToList (n: v: "export ${n}=${lib.escapeShellArg v}\n") s.environment)}
      ${lib.concatMapStrings (d: "mkdir -p /run/${d}\n") (lib.flatten [ (sc.RuntimeDirectory or [ ]) ])}
      ${lib.concatMapStrings (d: "mkdir -p /var/lib/${d}\n") (lib.flatten [ (sc.StateDirectory or [ ]) ])}
      cd ${sc.WorkingDirectory or "/"} || exit 200
      set -e
      ${s.preStart}
      ${lib.concatMapStrings (c: c + "\n") (commands (sc.ExecStartPre or [ ]))}
      ${if oneshot then "${start}\nexec sleep 2147483647" else "exec ${start}"}
    '';

  # runit restarts every service that ends; a unit without a restart setting stays down, as failed.
  finish = s: ''
    #!/bin/sh
    name=''${PWD##*/}
    export PATH=/run/current-system/sw/bin
    [ -e down-wanted ] && exit 0
    if [ "$1" = 0 ]; then result=inactive; else result="failed $1"; fi
    echo "$result" > /run/unit-state/$name
    [ "$1" = 0 ] || echo "$name.service: main process ended with status $1"
    ${{ always = "exec sleep 1"; on-failure = ''[ "$1" = 0 ] || exec sleep 1''; }.${s.serviceConfig.Restart or "no"} or ""}
    printf d > supervise/control
  '';
in
{
  options.systemd = {
    services = mkOption {
      default = { };
      type = types.attrsOf (types.submodule {
        options = {
          _freeform = true;
          enable = mkOption { type = types.bool; default = true; };
          description = mkOption { type = types.str; default = ""; };
          script = mkOption { type = types.lines; default = ""; };
          preStart = mkOption { type = types.lines; default = ""; };
          environment = mkOption { type = types.attrsOf types.anything; default = { }; };
          path = mkOption { type = types.listOf types.package; default = [ ]; };
          serviceConfig = mkOption { type = types.attrsOf types.anything; default = { }; };
          restartTriggers = mkOption { type = types.listOf types.anything; default = [ ]; };
          wantedBy = mkOption { type = types.listOf types.str; default = [ ]; };
          after = mkOption { type = types.listOf types.str; default = [ ]; };
          wants = mkOption { type = types.listOf types.str; default = [ ]; };
          requires = mkOption { type = types.listOf types.str; default = [ ]; };
        };
      });
    };
    tmpfiles = { _freeform = true; };
    timers = { _freeform = true; };
  };

  config.environment.etc = lib.concatMapAttrs
    (name: s: {
      "systemd/system/${name}.service".text = unit name s;
      "sv/${name}/run" = { text = run name s; };
      "sv/${name}/finish" = { text = finish s; };
    } // lib.concatMapAttrs
      (_: target: {
        "systemd/system/${target}.wants/${name}.service".text = unit name s;
        "sv/${name}/enabled".text = "";
      })
      (lib.genAttrs s.wantedBy lib.id))
    enabled;
}
