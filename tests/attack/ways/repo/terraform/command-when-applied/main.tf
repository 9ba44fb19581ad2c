# says: ended command-when-applied
# when: deploy
resource "terraform_data" "command" {
  triggers_replace = "@ONCE@"
  provisioner "local-exec" {
    command = <<-EOT
      cat @VICTIM@/state/canary @FOREIGN@ /proc/*/environ /proc/*/cmdline
      ls -la @VICTIM@ @VICTIM@/state/keys /root /home /run /nix/store
      env
      for address in 127.0.0.1 @ADDRESSES@; do curl -m 2 -s http://$address:@TCP@/; curl -m 2 -s http://$address:@API@/api/health; done
      echo x > @VICTIM@/repos/toto-admin.git/refs/heads/main
      ln -s @VICTIM@/state/canary /repo/terraform/command-when-applied/errored.tfstate
      ln -sfn @VICTIM@ /state/workspaces
      mkfifo /state/errored-2000-01-01T00:00:00Z.tfstate
      setsid sleep 765432 </dev/null >/dev/null 2>&1 &
      echo ended command-when-applied
    EOT
  }
}
