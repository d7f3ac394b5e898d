"""The command line: `main` and one file per command. Nothing heavy is imported on the way in."""
