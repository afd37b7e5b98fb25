"""What the pages share: templates whose every text is escaped, and small copies of the images. A page needs no network.

page.css and page.js hold what all of them look like and do, gallery.js what those with a gallery do.
"""

import base64
import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jinja2
from PIL import Image

from common.files import write_text
from common.images import BadImage, decode_image, image_bytes

THUMBNAIL = 384  # pixels; a phone's card shows about 180, a laptop's 300
QUALITY = 82


def write_page(path: Path, template: str, **content) -> Path:
    """Render eval/`template` to `path` and return that."""
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True,
                                     undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    write_text(path, environment.get_template(template).render(**content))
    return path


def thumbnail(data: bytes, side: int = THUMBNAIL) -> bytes:
    """A JPEG of at most `side` pixels, of a small image without visible loss. Raises BadImage."""
    image = decode_image(data)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    jpeg = io.BytesIO()
    small = {"quality": 98, "subsampling": 0} if max(image.size) <= side // 2 else {"quality": QUALITY}
    image.save(jpeg, "JPEG", **small)
    return jpeg.getvalue()


def data_uri(jpeg: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()


def place_images(folder: Path, paths: list[str], inline: bool) -> list[str]:
    """The src of each image's thumbnail: a data URI, or a file that this writes into report_images/; "" where the image has
    gone since it was scored."""
    beside = folder / "report_images"
    if not inline:
        beside.mkdir(exist_ok=True)

    def place(numbered: tuple[int, str]) -> str:
        number, path = numbered
        try:
            jpeg = thumbnail(image_bytes({"path": path}))
        except BadImage:
            return ""
        if inline:
            return data_uri(jpeg)
        (beside / f"{number}.jpg").write_bytes(jpeg)
        return f"report_images/{number}.jpg"

    with ThreadPoolExecutor() as pool:
        return list(pool.map(place, enumerate(paths)))
