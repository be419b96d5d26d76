"""``python -m tdc_tvm`` is ``tdc``."""

from tdc_tvm.cli import app

if __name__ == "__main__":
    app()
