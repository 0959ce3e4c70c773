"""What each subcommand does; imported only when it is asked for, so that `graft --help` is quick."""
