"""Small images and overlays of masks."""

import io
from pathlib import Path

import pytest
from PIL import Image

from api.pages.images import UnreadableImageError, overlay, thumbnail
from tests.unit.api.pages.conftest import Site


def image_of(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content))


def test_a_thumbnail_keeps_the_proportions(tmp_path: Path) -> None:
    Image.new("RGB", (400, 200), "red").save(tmp_path / "a.png")
    small = image_of(thumbnail(tmp_path / "a.png", 128))
    assert (small.format, small.size) == ("WEBP", (128, 64))


def test_a_small_image_is_not_enlarged(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
    assert image_of(thumbnail(tmp_path / "a.png", 256)).size == (64, 64)


def test_an_overlay_is_opaque_where_the_mask_is_white(tmp_path: Path) -> None:
    mask = Image.new("L", (2, 1), 0)
    mask.putpixel((1, 0), 255)
    mask.save(tmp_path / "mask.png")
    alpha = image_of(overlay(tmp_path / "mask.png")).getchannel("A")
    assert [alpha.getpixel((x, 0)) for x in (0, 1)] == [0, 178]  # 0.7 x 255


@pytest.mark.parametrize("content", [b"", b"no image", b"GIF89a" + bytes(20)])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(UnreadableImageError):
        thumbnail(tmp_path / "a.png", 128)


def test_images_are_kept_by_browsers(site: Site) -> None:
    pair = site.client.get(f"/pairs/{site.run.pairs[0]}").json()
    url = pair["base"]["image"].replace("/artifacts/", "/images/")
    sizes = {variant: site.client.get(url + variant) for variant in ("", "?size=128", "?overlay=true")}
    assert [response.headers["content-type"] for response in sizes.values()] == ["image/png", "image/webp", "image/png"]
    assert sizes[""].content == site.client.get(pair["base"]["image"]).content
    etags = {response.headers["etag"] for response in sizes.values()}
    assert len(etags) == 3
    for variant, response in sizes.items():
        assert "immutable" in response.headers["cache-control"]
        again = site.client.get(url + variant, headers={"If-None-Match": response.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")


def test_only_images_are_served_as_images(site: Site) -> None:
    model = site.client.get(f"/models/{site.run.model_id}").json()
    log = model["statistics"]["log"].replace("/artifacts/", "/images/")
    assert site.client.get(log).status_code == 404
    assert site.client.get("/images/art_x").status_code == 404
    assert site.client.get("/images/art_x?size=5000").status_code == 422
