"""Commands: read files, call the branch that does the work, render. The two branches meet here."""
