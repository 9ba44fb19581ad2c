# A web server with one page.
{ pkgs, ... }:
{
  environment.etc."www/index.html".text = ''
    <h1>Hello from the fleet</h1>
  '';
  systemd.services.web = {
    description = "The page";
    wantedBy = [ "multi-user.target" ];
    serviceConfig = {
      ExecStart = "${pkgs.busybox}/bin/busybox httpd -f -p 8080 -h /etc/www";
      Restart = "always";
    };
  };
  networking.firewall.allowedTCPPorts = [ 8080 ];
}
