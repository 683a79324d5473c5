raise SystemExit("isoflop.py has moved: python -m experiments.isoflop")
