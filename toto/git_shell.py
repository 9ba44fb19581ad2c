"""The old name of `toto.git_host.shell`, which the sshd_config of older installations says."""

from toto.git_host.shell import main

if __name__ == "__main__":
    main()
