# A machine's side of toto in a virtual machine: `nix-build -A tests.flying-monkey`.
# It needs what a binary cache has, and /dev/kvm. toto's own tests only evaluate it.
{ pkgs }:
let
  inherit (import (pkgs.path + "/nixos/tests/ssh-keys.nix") pkgs) snakeOilPrivateKey snakeOilPublicKey;
  key = builtins.concatStringsSep " " (pkgs.lib.take 2 (pkgs.lib.splitString " " snakeOilPublicKey));
  common = {
    imports = [ ../flying-monkey.nix ];
    services.openssh.enable = true;
    services.flying-monkey = { enable = true; repo = "infra"; signers = [ key ]; };
  };
in
pkgs.testers.runNixOSTest {
  name = "flying-monkey";

  nodes.pushed = {
    imports = [ common ];
    services.flying-monkey.loginKeys = [ snakeOilPublicKey ];
  };
  nodes.pulled = {
    imports = [ common ];
    services.flying-monkey = {
      url = "https://toto:4201";
      checks."10-page" = "echo 1..1; echo ok";
      metrics.folder = "/var/lib/node-exporter";
    };
  };
  nodes.toto = { };

  testScript = ''
    start_all()
    toto.succeed("install -m 600 ${snakeOilPrivateKey} /root/key")
    ssh = "ssh -i /root/key -o StrictHostKeyChecking=accept-new toto@pushed"
    pushed.wait_for_unit("sshd.service")
    toto.wait_until_succeeds(f"{ssh} facts", timeout=120)
    for command in ("id", "'facts; id'", "-t facts -v", "sudo id", ""):
        toto.fail(f"{ssh} {command}")
    toto.fail("sftp -i /root/key -o StrictHostKeyChecking=accept-new toto@pushed")
    toto.succeed(f"echo nothing | {ssh} arm | grep error")
    pushed.succeed("test ! -e /var/lib/flying-monkey/memory.json")

    # The agent asks, toto is not there, and nothing comes of it.
    pulled.wait_for_unit("flying-monkey.service")
    pulled.fail("id toto")
    pulled.succeed("test -x /etc/flying-monkey/checks.d/10-page")
    pulled.wait_until_succeeds("grep '^flying_monkey_up' /var/lib/node-exporter/flying-monkey.prom", timeout=120)
  '';
}
