"""The paper's memory design (§4.2-§4.5): allocators, block tables, and the tensors behind them."""
