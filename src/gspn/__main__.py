"""`python -m gspn` is the `gspn` command."""

if __name__ == "__main__":
    from gspn.cli import main  # here, because the processes of gspn.bench import this module

    main()
