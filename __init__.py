"""splitserve: serve large language models with prefill and decode split over two pools of workers."""

__version__ = "0.1.0"
