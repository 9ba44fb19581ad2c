# Cards get their names by MAC address, and DHCP. Firewall rules are recorded and not enforced.
{ config, lib, pkgs, ... }:
let
  inherit (lib) mkOption types;
  cfg = config.networking;
  links = lib.filter (l: l.matchConfig ? PermanentMACAddress && l.linkConfig ? Name) (lib.attrValues config.systemd.network.links);
  chosen = useDHCP: lib.attrNames (lib.filterAttrs (_: i: i.useDHCP == useDHCP) cfg.interfaces);
in
{
  options = {
    networking = {
      hostName = mkOption { type = types.str; default = "nixos"; };
      useDHCP = mkOption { type = types.bool; default = true; };
      firewall.allowedTCPPorts = mkOption { type = types.listOf types.port; default = [ ]; };
      firewall._freeform = true;
      interfaces = mkOption {
        default = { };
        type = types.attrsOf (types.submodule {
          options = {
            _freeform = true;
            useDHCP = mkOption { type = types.nullOr types.bool; default = null; };
          };
        });
      };
    };
    systemd.network.links = mkOption {
      default = { };
      type = types.attrsOf (types.submodule {
        options = {
          _freeform = true;
          matchConfig = mkOption { type = types.attrsOf types.anything; default = { }; };
          linkConfig = mkOption { type = types.attrsOf types.anything; default = { }; };
        };
      });
    };
  };

  config = {
    environment.etc = {
      hostname.text = cfg.hostName + "\n";
      hosts.text = "127.0.0.1 localhost\n::1 localhost\n127.0.0.2 ${cfg.hostName}\n";
      "lab/links".text = lib.concatMapStrings (l: "${l.matchConfig.PermanentMACAddress} ${l.linkConfig.Name}\n") links;
      "lab/firewall-tcp".text = lib.concatMapStrings (p: "${toString p}\n") cfg.firewall.allowedTCPPorts;
      "lab/udhcpc".source = ../scripts/udhcpc.sh;
    };
    systemd.services.dhcp = {
      description = "DHCP client of every card that wants it";
      wantedBy = [ "multi-user.target" ];
      serviceConfig.Restart = "always";
      script = ''
        wanted() {
          case " ${toString (chosen true)} " in *" $1 "*) return 0 ;; esac
          case " ${toString (chosen false)} " in *" $1 "*) return 1 ;; esac
          ${if cfg.useDHCP then "true" else "false"}
        }
        trap 'kill $(jobs -p); exit 0' TERM
        for card in /sys/class/net/*; do
          card=''${card##*/}
          [ "$card" != lo ] && wanted "$card" || continue
          # It retries quickly: a card whose link is down may be connected at any moment.
          udhcpc -f -S -i "$card" -t 2 -T 1 -A 1 -s /etc/lab/udhcpc &
        done
        wait
      '';
    };
  };
}
