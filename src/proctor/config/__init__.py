"""run.yaml in, a frozen RunSpec out: strict, pure, without environment reads."""
