# /etc, made as NixOS makes it (a tree in the store, linked from /etc/static), and the programs on PATH.
{ config, lib, pkgs, ... }:
let
  inherit (lib) mkOption types;
  entries = lib.filter (e: e.enable) (lib.attrValues config.environment.etc);
in
{
  options.environment = {
    etc = mkOption {
      default = { };
      type = types.attrsOf (types.submodule ({ name, ... }: {
        options = {
          enable = mkOption { type = types.bool; default = true; };
          target = mkOption { type = types.str; default = name; };
          text = mkOption { type = types.nullOr types.lines; default = null; };
          source = mkOption { type = types.nullOr types.path; default = null; };
          mode = mkOption { type = types.str; default = "symlink"; };
          user = mkOption { type = types.str; default = "root"; };
          group = mkOption { type = types.str; default = "root"; };
        };
      }));
    };
    systemPackages = mkOption { type = types.listOf types.package; default = [ ]; };
    variables = mkOption { type = types.attrsOf types.str; default = { }; };
  };

  options.system.build = {
    etc = mkOption { type = types.package; };
    path = mkOption { type = types.package; };
  };

  config = {
    environment.etc = {
      NIXOS.text = "";
      "profile".text = ''
        export PATH=/run/wrappers/bin:/run/current-system/sw/bin
        ${lib.concatStrings (lib.mapAttrsToList (n: v: "export ${n}=${lib.escapeShellArg v}\n") config.environment.variables)}
      '';
      "os-release".text = ''
        ID=nixos
        NAME=NixOS
        PRETTY_NAME="NixOS ${config.system.nixos.label} (lab)"
        VERSION_ID="${config.system.nixos.release}"
      '';
    };

    # One derivation for all of /etc: text n is in the file that passAsFile makes of the attribute text<n>.
    system.build.etc = pkgs.build "etc"
      ({
        passAsFile = [ "index" ] ++ lib.imap0 (i: _: "text${toString i}") entries;
        index = lib.concatLines (lib.imap0
          (i: e: "${toString i} ${e.target} ${e.mode} ${e.user}:${e.group} ${if e.source != null then "${e.source}" else "-"}")
          entries);
      } // lib.listToAttrs (lib.imap0
        (i: e: lib.nameValuePair "text${toString i}" (if e.text != null then e.text else "")) entries))
      ''
        mkdir -p $out/etc
        while read -r i target mode owner source; do
          mkdir -p "$(dirname "$out/etc/$target")"
          if [ "$source" = - ]; then
            eval "text=\$text''${i}Path"
            cp "$text" "$out/etc/$target"
            case $(head -c 2 "$text") in "#!") chmod +x "$out/etc/$target" ;; esac
          elif [ "$mode" = symlink ]; then
            ln -s "$source" "$out/etc/$target"
          else
            cp "$source" "$out/etc/$target"
          fi
          # A file that must be a copy in /etc has a file with its mode next to it.
          [ "$mode" = symlink ] || echo "$mode $owner" > "$out/etc/$target.mode"
        done < "$indexPath"
        # For the activation: a tree of the links that /etc gets, and lists of links and of copies.
        mkdir -p $out/links
        cd $out/etc
        find . ! -type d ! -name '*.mode' | sed 's|^\./||' | sort | while read -r file; do
          if [ -e "$file.mode" ]; then echo "$file" >> $out/copies; continue; fi
          echo "$file" >> $out/list
          case $file in */*) mkdir -p "$out/links/''${file%/*}" ;; esac
          ln -s "/etc/static/$file" "$out/links/$file"
        done
      '';

    system.build.path = pkgs.buildEnv { name = "system-path"; paths = config.environment.systemPackages ++ [ pkgs.base ]; };
  };
}
