raise SystemExit("gpt2.py has moved: python -m support.gpt2")
