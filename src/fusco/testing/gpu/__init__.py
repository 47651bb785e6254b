"""What is checked where there are GPUs; `python -m fusco.testing.gpu` needs no test tools."""
