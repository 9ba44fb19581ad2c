# says: connection refused|dial tcp
terraform {
  backend "http" {
    address   = "http://localhost:@TCP@/"
    retry_max = 0
  }
}
