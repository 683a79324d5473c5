raise SystemExit("bench.py has moved: python -m experiments.bench")
