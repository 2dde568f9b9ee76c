"""A fake food-11 of drawn dishes, for the tests and for --demo.

    python tests/fake_food11.py my-folder --training 30 --validation 10
"""
import argparse
from pathlib import Path

import cv2
import numpy as np


def draw_dish(label, rng):  # noqa: C901, one branch a dish
    """One drawn dish of class `label` as uint8 (160, 160, 3), BGR.

    rng, a NumPy generator, varies its place, size, angle, colours and noise.
    """
    image = np.full((160, 160, 3), rng.integers(60, 200, 3), np.uint8)
    centre, radius, turn = rng.uniform(68, 92, 2), rng.uniform(46, 62), rng.uniform(-.6, .6)
    cos, sin = radius * np.cos(turn), radius * np.sin(turn)

    def place(points):
        """From the dish's own coordinates, -1..1, to pixels."""
        return np.int32(np.asarray(points) @ [[cos, sin], [-sin, cos]] + centre).reshape(-1, 2)

    def shade(colour):
        return np.clip(np.add(colour, rng.integers(-18, 19, 3)), 0, 255).tolist()

    def disc(x, y, width, height, colour, angle=0):
        axes = (max(1, int(width * radius)), max(1, int(height * radius)))
        cv2.ellipse(image, place([x, y])[0].tolist(), axes, np.degrees(turn) + angle, 0, 360,
                    shade(colour), -1, cv2.LINE_AA)

    def shape(points, colour):
        cv2.fillPoly(image, [place(points)], shade(colour), cv2.LINE_AA)

    def line(points, colour, width):
        thickness = max(1, int(width * radius))
        cv2.polylines(image, [place(points)], False, shade(colour), thickness, cv2.LINE_AA)

    disc(0, 0, 1.15, 1.15, (235, 235, 235))  # the plate
    if label == 0:  # a loaf with three cuts
        disc(0, 0, .95, .55, (60, 120, 190))
        for x in (-.5, 0, .5):
            line([(x - .1, -.3), (x + .1, .3)], (130, 190, 235), .1)
    elif label == 1:  # a wedge of cheese
        shape([(-.9, .5), (.9, .5), (.5, -.5)], (70, 210, 250))
        for x, y in ((-.2, .3), (.3, .2), (.4, -.2)):
            disc(x, y, .12, .12, (40, 160, 210))
    elif label == 2:  # a cupcake with a cherry
        shape([(-.6, .1), (.6, .1), (.4, .8), (-.4, .8)], (60, 80, 130))
        disc(0, 0, .75, .45, (190, 150, 250))
        disc(0, -.5, .18, .18, (40, 20, 200))
    elif label == 3:  # a fried egg
        disc(0, 0, .95, .75, (250, 252, 252), rng.uniform(0, 180))
        disc(.1, 0, .35, .35, (30, 170, 250))
    elif label == 4:  # chips
        for x in np.linspace(-.7, .7, 7):
            line([(x, -.7), (x + rng.uniform(-.3, .3), .7)], (60, 190, 240), .16)
    elif label == 5:  # a steak on its bone
        disc(0, 0, .9, .65, (150, 170, 230))
        disc(0, 0, .78, .54, (50, 50, 140))
        disc(.35, 0, .18, .18, (225, 230, 235))
    elif label == 6:  # noodles
        for y in np.linspace(-.6, .6, 8):
            t = np.linspace(-.8, .8, 30)
            wave = y + .12 * np.sin(9 * t + rng.uniform(0, 6))
            line(np.stack([t, wave], 1), (110, 210, 240), .07)
    elif label == 7:  # rice in a dark bowl
        disc(0, 0, 1, 1, (70, 50, 40))
        for x, y in rng.normal(0, .35, (150, 2)):
            disc(x, y, .12, .04, (238, 242, 245), rng.uniform(0, 180))
    elif label == 8:  # a fish
        disc(-.15, 0, .75, .38, (190, 150, 110))
        shape([(.4, 0), (.95, -.4), (.95, .4)], (170, 130, 90))
        disc(-.6, -.08, .07, .07, (20, 20, 20))
    elif label == 9:  # tomato soup with herbs
        disc(0, 0, .95, .95, (40, 90, 225))
        for x, y in rng.uniform(-.55, .55, (8, 2)):
            disc(x, y, .09, .05, (60, 150, 60), rng.uniform(0, 180))
    else:  # label 10, and all that follow: an apple with its leaf
        disc(0, .1, .68, .68, (50, 40, 205))
        line([(0, -.5), (.08, -.85)], (30, 60, 90), .08)
        disc(.35, -.75, .3, .13, (60, 170, 70))
    return np.clip(image + rng.normal(0, 9, image.shape), 0, 255).astype(np.uint8)


def draw_food11(folder, training=30, validation=10, class_count=11):
    """Draws a food-11 into `folder`: the given number of JPEGs of each class, no two the same."""
    for split, count in (('training', training), ('validation', validation)):
        target = Path(folder, split)
        target.mkdir(parents=True, exist_ok=True)
        for label in range(class_count):
            for i in range(count):
                rng = np.random.default_rng([split == 'validation', label, i])
                _, jpeg = cv2.imencode('.jpg', draw_dish(label, rng))
                # cv2.imwrite cannot open a path with Chinese characters on Windows.
                (target / f'{label}_{i}.jpg').write_bytes(jpeg.tobytes())


def main():
    parser = argparse.ArgumentParser(description='Draws a fake food-11 into a folder.')
    parser.add_argument('folder')
    parser.add_argument('--training', type=int, default=30, metavar='N',
                        help='training images of each class (default: %(default)s)')
    parser.add_argument('--validation', type=int, default=10, metavar='N',
                        help='validation images of each class (default: %(default)s)')
    args = parser.parse_args()
    draw_food11(args.folder, args.training, args.validation)


if __name__ == '__main__':
    main()
