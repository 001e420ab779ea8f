from models.noise import uniform
from models.text import fold, hashed_words


def test_words_are_the_same_in_any_case_and_anywhere():
    words = hashed_words("Super Lamp: Speedrun!", 4, 4096)
    assert words == hashed_words("super lamp -- SPEEDRUN", 4, 4096)
    assert words == [2574, 614, 611, 4096]
    assert hashed_words("", 2, 10) == [10, 10]
    assert len(hashed_words("\u043e\u0434\u0438\u043d \u0434\u0432\u0430 \u0442\u0440\u0438", 2, 50)) == 2


def test_a_hash_begun_on_the_host_goes_on_on_the_device():
    import torch

    place = torch.arange(5)
    for numbers in ((0, 0), (2**63 - 1, 7), (12, 2**40)):
        state = torch.tensor(fold(*numbers))
        assert torch.equal(uniform(place, state=state), uniform(*numbers, place))
