from services.kvstore.pins import Pins

A, B, C = (bytes([number]) * 32 for number in range(3))


def test_a_pin_holds_until_its_time() -> None:
    now = [100.0]
    pins = Pins(lambda: now[0])
    pins.pin([A, B], until=110.0)
    assert (A in pins, C in pins, len(pins)) == (True, False, 2)
    now[0] = 110.0
    assert (A in pins, len(pins)) == (False, 0)


def test_pinning_again_never_shortens_a_pin() -> None:
    now = [100.0]
    pins = Pins(lambda: now[0])
    pins.pin([A], until=200.0)
    pins.pin([A], until=150.0)
    now[0] = 199.0
    assert A in pins


def test_unpinning_says_how_many_were_pinned() -> None:
    pins = Pins(lambda: 0.0)
    pins.pin([A, B], until=1.0)
    assert pins.unpin([A, C]) == 1
    assert (A in pins, B in pins) == (False, True)


def test_expired_pins_are_forgotten() -> None:
    now = [0.0]
    pins = Pins(lambda: now[0])
    pins.pin([A], until=1.0)
    pins.pin([B], until=3.0)
    now[0] = 2.0
    pins.forget_expired()
    now[0] = 0.0  # what is forgotten does not come back
    assert (A in pins, B in pins) == (False, True)
