import os

os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # before torch is imported: see train.py
