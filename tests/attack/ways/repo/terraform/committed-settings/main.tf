# says: settings: nothing
output "settings" { value = "settings: ${try(file("@VICTIM@/state/canary"), "nothing")}" }
