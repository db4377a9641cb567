"""Networks of convolutions as kernels, from the papers that published them.

Only shapes: what `trivium.compiler.kernels` would count of the ONNX file, in int8, with everything
elementwise melted into the convolution before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache, partial

from trivium.compiler.kernels import Kernel
from trivium.compiler.work import Product


class Net:
    """A network that is being put together, and the feature map at its end."""

    def __init__(self, height: int, width: int, channels: int = 3) -> None:
        self.height, self.width, self.channels = height, width, channels
        self.kernels: list[Kernel] = []

    def at(self, shape: tuple[int, int, int]) -> Net:
        """Go on from another feature map."""
        self.height, self.width, self.channels = shape
        return self

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.height, self.width, self.channels

    def conv(
        self,
        out: int,
        size: int | tuple[int, int] = 1,
        stride: int = 1,
        *,
        groups: int = 1,
        valid: bool = False,
        adds: bool = False,
    ) -> Net:
        """A convolution; ``adds`` where a sum melts into it."""
        tall, wide = (size, size) if isinstance(size, int) else size
        before = self.height * self.width * self.channels
        inner = self.channels // groups
        if valid:
            self.height, self.width = self.height - tall + 1, self.width - wide + 1
        self.height, self.width = (math.ceil(one / stride) for one in (self.height, self.width))
        pixels, taps = self.height * self.width, float(tall * wide)
        after = pixels * out
        self.channels = out
        product = Product(pixels, out // groups, inner * taps, groups, self.width, taps)
        self.kernels.append(
            Kernel(
                "",
                ("Conv",),
                {"int8": product.operations},
                weight_bytes=out * inner * taps,
                read_bytes=float(before + (after if adds else 0)),
                written_bytes=float(after),
                products=(product,),
            )
        )
        return self

    def depthwise(self, size: int, stride: int = 1) -> Net:
        return self.conv(self.channels, size, stride, groups=self.channels)

    def pool(self, stride: int = 2, *, valid: int = 0, everything: bool = False) -> Net:
        """A pool; ``valid`` is the window of one without padding."""
        before = self.height * self.width * self.channels
        if everything:
            self.height = self.width = 1
        if valid:
            self.height, self.width = self.height - valid + 1, self.width - valid + 1
        self.height, self.width = (math.ceil(one / stride) for one in (self.height, self.width))
        after = self.height * self.width * self.channels
        found = Kernel("", ("MaxPool",), read_bytes=float(before), written_bytes=float(after))
        self.kernels.append(found)
        return self

    def classify(self, classes: int = 1000) -> Net:
        return self.pool(everything=True).conv(classes)


BLOCKS = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


def resnet(
    depth: int, height: int, width: int, strides: str = "second", first: bool = False
) -> Net:
    """He et al., 2015, and with normalization ``first`` (2016), which melts into no convolution.
    Where a stage strides: in its first block's first convolution, in the second (as in
    torchvision), or in the last block of the stage before (as in TensorFlow's slim)."""
    net = Net(height, width).conv(64, 7, 2).pool()
    for stage, blocks in enumerate(BLOCKS[depth]):
        inner = 64 << stage
        out = inner if depth == 18 else 4 * inner
        for block in range(blocks):
            if strides == "slim":
                stride = 2 if block == blocks - 1 and stage < 3 else 1
            else:
                stride = 2 if block == 0 and stage > 0 else 1
            if first:
                net.pool(1)
            start = net.shape
            if block == 0 and start[2] != out:
                net.conv(out, 1, 1 if strides == "slim" else stride).at(start)
            if depth == 18:
                net.conv(inner, 3, stride).conv(out, 3, adds=True)
                continue
            early = strides == "first"
            net.conv(inner, 1, stride if early else 1)
            net.conv(inner, 3, 1 if early else stride).conv(out, adds=True)
    return net.classify()


def vgg(depth: int) -> Net:
    """Simonyan and Zisserman, 2014."""
    net = Net(224, 224)
    for out, times in zip((64, 128, 256, 512, 512), (2, 2, 3, 3, 3), strict=True):
        for _ in range(times + (depth == 19 and times == 3)):
            net.conv(out, 3)
        net.pool()
    net.at((1, 1, 512 * 49)).conv(4096).conv(4096).conv(1000)
    return net


def _branches(net: Net, *branches: Callable[[Net], Net]) -> Net:
    """Branches from one feature map, side by side along the channels; a branch that strides has
    the last say on its size."""
    start, channels = net.shape, 0
    for branch in branches:
        branch(net.at(start))
        channels += net.channels
    return net.at((net.height, net.width, channels))


def _pooled(out: int) -> Callable[[Net], Net]:
    return lambda net: net.pool(1).conv(out)


def _chain(*steps: tuple[int, int | tuple[int, int]]) -> Callable[[Net], Net]:
    def run(net: Net) -> Net:
        for out, size in steps:
            net.conv(out, size)
        return net

    return run


GOOGLENET = (
    *((64, 96, 128, 16, 32, 32), (128, 128, 192, 32, 96, 64), None),
    *((192, 96, 208, 16, 48, 64), (160, 112, 224, 24, 64, 64), (128, 128, 256, 24, 64, 64)),
    *((112, 144, 288, 32, 64, 64), (256, 160, 320, 32, 128, 128), None),
    *((256, 160, 320, 32, 128, 128), (384, 192, 384, 48, 128, 128)),
)


def inception_v1(last: int = 5) -> Net:
    """Szegedy et al., 2014; TensorFlow's has 3 x 3 windows in the last branch."""
    net = Net(224, 224).conv(64, 7, 2).pool().conv(64).conv(192, 3).pool()
    for sizes in GOOGLENET:
        if sizes is None:
            net.pool()
            continue
        one, three, wide, five, wider, pooled = sizes
        chains = _chain((one, 1)), _chain((three, 1), (wide, 3)), _chain((five, 1), (wider, last))
        _branches(net, *chains, _pooled(pooled))
    return net.classify()


def _down(*steps: tuple[int, int | tuple[int, int]]) -> Callable[[Net], Net]:
    """A chain whose last convolution strides, without padding."""

    def run(net: Net) -> Net:
        _chain(*steps[:-1])(net)
        out, size = steps[-1]
        return net.conv(out, size, 2, valid=True)

    return run


def inception_v3() -> Net:
    """Szegedy et al., 2015."""
    net = Net(299, 299).conv(32, 3, 2, valid=True).conv(32, 3, valid=True).conv(64, 3)
    net.pool(valid=3).conv(80).conv(192, 3, valid=True).pool(valid=3)
    for pooled in (32, 64, 64):
        chains = _chain((64, 1)), _chain((48, 1), (64, 5)), _chain((64, 1), (96, 3), (96, 3))
        _branches(net, *chains, _pooled(pooled))
    pool = partial(Net.pool, valid=3)
    _branches(net, _down((384, 3)), _down((64, 1), (96, 3), (96, 3)), pool)
    for inner in (128, 160, 160, 192):
        tall, wide = (7, 1), (1, 7)
        long = _chain((inner, 1), (inner, tall), (inner, wide), (inner, tall), (192, wide))
        chains = _chain((192, 1)), _chain((inner, 1), (inner, wide), (192, tall)), long
        _branches(net, *chains, _pooled(192))
    last = _down((192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3))
    _branches(net, _down((192, 1), (320, 3)), last, pool)
    for _ in range(2):
        chains = _chain((320, 1)), _forked((384, 1)), _forked((448, 1), (384, 3))
        _branches(net, *chains, _pooled(192))
    return net.classify()


def _forked(*steps: tuple[int, int | tuple[int, int]], out: int = 384) -> Callable[[Net], Net]:
    def run(net: Net) -> Net:
        _chain(*steps)(net)
        return _branches(net, _chain((out, (1, 3))), _chain((out, (3, 1))))

    return run


def inception_v4() -> Net:
    """Szegedy et al., 2016."""
    net = Net(299, 299).conv(32, 3, 2, valid=True).conv(32, 3, valid=True).conv(64, 3)
    pool = partial(Net.pool, valid=3)
    _branches(net, pool, _down((96, 3)))

    def narrow(net: Net, *steps: tuple[int, int | tuple[int, int]]) -> Net:
        return _chain(*steps)(net).conv(96, 3, valid=True)

    _branches(
        net,
        lambda one: narrow(one, (64, 1)),
        lambda one: narrow(one, (64, 1), (64, (7, 1)), (64, (1, 7))),
    )
    _branches(net, _down((192, 3)), pool)
    for _ in range(4):
        chains = _chain((96, 1)), _chain((64, 1), (96, 3)), _chain((64, 1), (96, 3), (96, 3))
        _branches(net, *chains, _pooled(96))
    _branches(net, _down((384, 3)), _down((192, 1), (224, 3), (256, 3)), pool)
    for _ in range(7):
        short = _chain((192, 1), (224, (1, 7)), (256, (7, 1)))
        long = _chain((192, 1), (192, (1, 7)), (224, (7, 1)), (224, (1, 7)), (256, (7, 1)))
        _branches(net, _chain((384, 1)), short, long, _pooled(128))
    last = _down((256, 1), (256, (1, 7)), (320, (7, 1)), (320, 3))
    _branches(net, _down((192, 1), (192, 3)), last, pool)
    for _ in range(3):
        forks = (
            _forked((384, 1), out=256),
            _forked((384, 1), (448, (1, 3)), (512, (3, 1)), out=256),
        )
        _branches(net, _chain((256, 1)), *forks, _pooled(256))
    return net.classify()


def mobilenet_v1(width: float, size: int) -> Net:
    """Howard et al., 2017."""
    net = Net(size, size).conv(int(32 * width), 3, 2)
    for out, stride in (
        *((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)),
        *[(512, 1)] * 5,
        *((1024, 2), (1024, 1)),
    ):
        net.depthwise(3, stride).conv(int(out * width))
    return net.classify()


def mobilenet_v2(width: float, size: int) -> Net:
    """Sandler et al., 2018."""

    def wide(out: int) -> int:
        return max(8, int(out * width + 4) // 8 * 8)

    net = Net(size, size).conv(wide(32), 3, 2)
    settings = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2))
    for grows, out, times, stride in (*settings, (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)):
        for index in range(times):
            if grows > 1:
                net.conv(net.channels * grows)
            net.depthwise(3, stride if index == 0 else 1).conv(wide(out), adds=index > 0)
    return net.conv(wide(1280) if width > 1 else 1280).classify()


def squeezenet() -> Net:
    """Iandola et al., 2016, version 1.1."""
    net = Net(224, 224).conv(64, 3, 2, valid=True).pool(valid=3)
    for index, squeezed in enumerate((16, 16, 32, 32, 48, 48, 64, 64)):
        net.conv(squeezed)
        _branches(net, _chain((4 * squeezed, 1)), _chain((4 * squeezed, 3)))
        if index in (1, 3):
            net.pool(valid=3)
    return net.conv(1000).pool(everything=True)


def yolo_v3(size: int, classes: int) -> Net:
    """Redmon and Farhadi, 2018: Darknet-53 and three heads."""
    net = Net(size, size).conv(32, 3)
    kept = []
    for out, times in ((64, 1), (128, 2), (256, 8), (512, 8), (1024, 4)):
        net.conv(out, 3, 2)
        for _ in range(times):
            net.conv(out // 2).conv(out, 3, adds=True)
        kept.append(net.shape)
    for inner, skip in ((512, None), (256, kept[3]), (128, kept[2])):
        if skip is not None:
            net.conv(inner).at((skip[0], skip[1], inner + skip[2]))
        net.conv(inner).conv(2 * inner, 3).conv(inner).conv(2 * inner, 3).conv(inner)
        start = net.shape
        net.conv(2 * inner, 3).conv(3 * (5 + classes)).at(start)
    return net


NETWORKS: Mapping[str, Callable[[], Net]] = {
    r"tf_inceptionv1_.*": partial(inception_v1, 3),
    r"cf_inceptionv1_.*": partial(inception_v1, 5),
    r".*_inceptionv3_.*": inception_v3,
    r".*_inceptionv4_.*": inception_v4,
    r"tf_mlperf_resnet50_.*": partial(resnet, 50, 224, 224),
    r"pt_resnet50_.*": partial(resnet, 50, 224, 224),
    r"(tf2|cf)_resnet50_.*": partial(resnet, 50, 224, 224, "first"),
    r"tf_resnet(v1_)?50_.*": partial(resnet, 50, 224, 224, "slim"),
    r"tf_resnetv1_101_.*": partial(resnet, 101, 224, 224, "slim"),
    r"tf_resnetv1_152_.*": partial(resnet, 152, 224, 224, "slim"),
    r"tf_resnetv2_50_.*": partial(resnet, 50, 299, 299, "slim", True),
    r"tf_resnetv2_101_.*": partial(resnet, 101, 299, 299, "slim", True),
    r"tf_resnetv2_152_.*": partial(resnet, 152, 299, 299, "slim", True),
    r"pt_vehicle-.*|cf_resnet18_.*": partial(resnet, 18, 224, 224),
    r"pt_personreid-res18_.*": partial(resnet, 18, 176, 80),
    r"pt_personreid-res50_.*": partial(resnet, 50, 256, 128),
    r"tf2?_mobilenetv1_(1\.0_)?imagenet_224.*": partial(mobilenet_v1, 1.0, 224),
    r"tf_mobilenetv1_0\.5_.*": partial(mobilenet_v1, 0.5, 160),
    r"tf_mobilenetv1_0\.25_.*": partial(mobilenet_v1, 0.25, 128),
    r"(tf_mobilenetv2_1\.0|cf_mobilenetv2)_.*": partial(mobilenet_v2, 1.0, 224),
    r"tf_mobilenetv2_1\.4_.*": partial(mobilenet_v2, 1.4, 224),
    r"pt_squeezenet_.*": squeezenet,
    r"tf_vgg16_.*": partial(vgg, 16),
    r"tf_vgg19_.*": partial(vgg, 19),
    r"(tf|dk)_yolov3_voc_.*": partial(yolo_v3, 416, 20),
    r"tf2_yolov3_coco_.*": partial(yolo_v3, 416, 80),
}
"""By the name in Vitis AI's zoo: networks whose paper says all of them."""


@cache
def kernels(pattern: str) -> tuple[Kernel, ...]:
    """Those of a network."""
    return tuple(NETWORKS[pattern]().kernels)
