# says: file: nothing.*
locals {
  secret = "@VICTIM@/state/canary"
}
output "file" { value = "file: ${try(file(local.secret), "nothing")}" }
output "base64" { value = try(base64decode(filebase64(local.secret)), "nothing") }
output "template" { value = try(templatefile(local.secret, {}), "nothing") }
output "names" { value = try(fileset("@VICTIM@", "**"), ["nothing"]) }
output "exists" { value = fileexists(local.secret) ? "CANARY THERE" : "nothing" }
output "up" { value = try(file("../../../../../../..${local.secret}"), "nothing") }
output "environment" { value = try(file("/proc/self/environ"), "nothing") }
output "parents" { value = try(file("/proc/1/environ"), "nothing") }
output "home" { value = try(file(pathexpand("~/.ssh/id_ed25519")), "nothing") }
