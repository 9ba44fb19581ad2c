# A plain host with a service of its own: it answers on port 8081.
{ pkgs, ... }:
{
  imports = [ ../modules/common.nix ];
  networking.hostName = "gate";
  environment.etc."gate/status".text = "open\n";
  systemd.services.gate = {
    description = "Says whether the gate is open";
    wantedBy = [ "multi-user.target" ];
    serviceConfig = {
      ExecStart = "${pkgs.busybox}/bin/busybox httpd -f -p 8081 -h /etc/gate";
      Restart = "always";
    };
  };
  networking.firewall.allowedTCPPorts = [ 8081 ];
}
