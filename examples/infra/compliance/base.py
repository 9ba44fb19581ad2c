"""What every machine of this fleet has to be, whatever else it is. See docs/compliance.md of toto."""

import pytest


@pytest.mark.impact(1.0)
def test_only_root_is_root(host):
    """No second user has the rights of root."""
    roots = host.check_output("awk -F: '$3 == 0 { print $1 }' /etc/passwd")
    assert roots == "root"


@pytest.mark.impact(0.7)
def test_shadow_is_read_by_root_alone(host):
    """Nobody but root reads the hashes of passwords."""
    assert host.file("/etc/shadow").mode & 0o077 == 0


@pytest.mark.impact(0.3)
def test_it_says_what_it_is(host):
    """The machine names its host."""
    assert host.check_output("hostname")
