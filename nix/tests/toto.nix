# A server of toto in a virtual machine, and somebody who pushes to it: `nix-build -A tests.toto`.
# It needs what a binary cache has, and /dev/kvm. toto's own tests only evaluate it.
{ pkgs }:
let
  inherit (import (pkgs.path + "/nixos/tests/ssh-keys.nix") pkgs) snakeOilPrivateKey snakeOilPublicKey;
in
pkgs.testers.runNixOSTest {
  name = "toto";

  nodes.toto = {
    imports = [ ../toto.nix ];
    virtualisation = { memorySize = 3072; cores = 2; diskSize = 8192; };
    networking.firewall.allowedTCPPorts = [ 22 4201 ];
    services.openssh.enable = true;
    services.toto = {
      enable = true;
      firstAdmin = { name = "alice"; key = snakeOilPublicKey; };
      machines.listen = "0.0.0.0";
      backup.enable = true;
      terraform = null;
    };
  };

  nodes.laptop = {
    environment.systemPackages = [ pkgs.git ];
    programs.ssh.extraConfig = ''
      Host toto
        User toto
        IdentityFile /root/key
        StrictHostKeyChecking accept-new
    '';
  };

  testScript = ''
    start_all()
    toto.wait_for_unit("toto-nix-daemon.service")
    toto.wait_until_succeeds("curl --fail --silent http://127.0.0.1:4200/api/health", timeout=600)

    laptop.succeed("install -m 600 ${snakeOilPrivateKey} /root/key")
    laptop.wait_until_succeeds("ssh toto 2>&1 | grep 'hello alice'", timeout=120)
    laptop.succeed("ssh toto repo create infra")
    laptop.succeed(
        "git init -q -b main infra && cd infra && echo 'machines: []' > machines.yaml && git add . "
        "&& git -c user.name=a -c user.email=a@b commit -qm first && git push toto:infra main"
    )

    # Nobody but the server's user reads its state, and the unit may do next to nothing.
    toto.fail("runuser -u nobody -- ls /var/lib/toto")
    toto.succeed("systemctl show toto -p User --value | grep -x toto")
    laptop.succeed("curl --insecure --silent https://toto:4201/ -o /dev/null")

    # It starts anew when no run is under way.
    before = toto.succeed("systemctl show toto -p MainPID --value")
    toto.wait_until_succeeds("journalctl -u toto | grep -q 'ready at'", timeout=600)
    toto.succeed("systemctl reload toto")
    toto.wait_until_succeeds(
        f"test $(systemctl show toto -p MainPID --value) -gt 0 -a $(systemctl show toto -p MainPID --value) -ne {before}",
        timeout=900,
    )

    # What is backed up is there again when all was lost.
    toto.wait_until_succeeds("curl --fail --silent http://127.0.0.1:4200/api/health", timeout=600)
    toto.succeed("systemctl start toto-backup")
    toto.succeed("systemctl stop toto && rm -r /var/lib/toto/server/repos /var/lib/toto/keys")
    toto.succeed("toto restore - < $(ls /var/lib/toto-backup/toto-*.tar)")
    toto.succeed("systemctl start toto")
    laptop.wait_until_succeeds("cd infra && git ls-remote toto:infra main | grep $(git rev-parse HEAD)", timeout=120)
  '';
}
