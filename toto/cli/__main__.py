from toto.cli import main

main()
