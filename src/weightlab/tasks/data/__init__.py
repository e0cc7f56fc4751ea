"""Data of the built-in tasks: embedded in Python, or in the Hub's layout on disk or on the Hub.

`WEIGHTLAB_DATA` names a folder with repository ids as sub-folders, e.g.
`$WEIGHTLAB_DATA/ylecun/mnist/mnist/train-00000-of-00001.parquet`. A repository that is there is read
from there, without a look at the network; any other comes from the Hub through its usual cache.
"""

from typing import TYPE_CHECKING

from weightlab._lazy import exports

if TYPE_CHECKING:
    from weightlab.tasks.data.alphabet import ALPHABET_SIZE, decode, encode
    from weightlab.tasks.data.cache import cache_folder
    from weightlab.tasks.data.docs import docs_text
    from weightlab.tasks.data.hub import model_file, parquet_files
    from weightlab.tasks.data.images import Images, load_images
    from weightlab.tasks.data.text import load_text

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "ALPHABET_SIZE": ".alphabet",
        "Images": ".images",
        "cache_folder": ".cache",
        "decode": ".alphabet",
        "docs_text": ".docs",
        "encode": ".alphabet",
        "load_images": ".images",
        "load_text": ".text",
        "model_file": ".hub",
        "parquet_files": ".hub",
    },
)
