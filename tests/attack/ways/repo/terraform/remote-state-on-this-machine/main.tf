# says: connection refused|dial tcp|no route|prohibited
data "terraform_remote_state" "other" {
  backend = "http"
  config  = { address = "http://@ADDRESS@:@TCP@/state", retry_max = 0 }
}
