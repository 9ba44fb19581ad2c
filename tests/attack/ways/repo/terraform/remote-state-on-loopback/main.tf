# says: connection refused|dial tcp
data "terraform_remote_state" "other" {
  backend = "http"
  config  = { address = "http://127.0.0.1:@TCP@/state", retry_max = 0 }
}
output "other" { value = data.terraform_remote_state.other }
