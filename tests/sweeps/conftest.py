from tests.engine.support import settings, small

__all__ = ["settings", "small"]
