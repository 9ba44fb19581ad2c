# A built-in resource of terraform, to try this without a provider; yours will be records of a DNS zone.
resource "terraform_data" "www" {
  input = "www 300 A 192.0.2.10"
}

output "records" {
  value = [terraform_data.www.output]
}
