# says: Failed to instantiate provider|plugin|Plugin
# when: rehearse deploy
# A program in the folder where terraform looks for providers: it runs when the root is planned.
terraform {
  required_providers { team = { source = "red/team", version = "1.0.0" } }
}
provider "team" {}
resource "team_thing" "x" {}
