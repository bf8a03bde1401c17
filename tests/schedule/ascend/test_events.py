from npu_sparse.schedule.ascend.events import Block, Instruction, ordered


def vector(text, reads="", writes=""):
    return Instruction("V", text, frozenset(reads.split()), frozenset(writes.split()))


def scalar(text, reads="", writes=""):
    return Instruction("S", text, frozenset(reads.split()), frozenset(writes.split()))


def lines(*items):
    return [line.strip() for line in ordered(list(items), 0)]


def test_a_vector_instruction_waits_for_what_it_reads_and_for_nothing_else():
    # the first barrier waits for the last iteration
    emitted = lines(vector("one", writes="x"), vector("other", writes="y"), vector("reader", reads="x"))
    assert emitted == ["PipeBarrier<PIPE_V>();", "one", "other", "PipeBarrier<PIPE_V>();", "reader"]


def test_the_scalar_unit_waits_for_the_vector_unit_and_back():
    emitted = lines(vector("make", writes="x"), scalar("get", reads="x"))
    assert emitted == ["Order<HardEvent::S_V>();", "make", "Order<HardEvent::V_S>();", "get"]


def test_waiting_for_the_scalar_unit_covers_what_that_has_waited_for():
    emitted = lines(vector("make", writes="x"), scalar("get", reads="x"), scalar("set", writes="y"), vector("use", reads="x y"))
    assert emitted[-2:] == ["Order<HardEvent::S_V>();", "use"]


def test_what_only_the_scalar_unit_has_waited_for_still_takes_a_barrier():
    emitted = lines(vector("make", writes="x"), scalar("get", reads="x"), vector("use", reads="x"))
    assert emitted[-2:] == ["PipeBarrier<PIPE_V>();", "use"]


def test_what_happened_before_a_loop_is_waited_for_once():
    emitted = lines(vector("make", writes="x"), Block("for (;;)", [scalar("get", reads="x")]))
    assert emitted[-4:] == ["Order<HardEvent::V_S>();", "for (;;) {", "get", "}"]


def test_an_iteration_waits_for_the_one_before():
    emitted = lines(Block("for (;;)", [vector("update", reads="x", writes="x")]))
    assert emitted[-3:] == ["PipeBarrier<PIPE_V>();", "update", "}"]


def test_loads_that_wait_for_nothing_come_first():
    emitted = lines(vector("make", writes="x"), scalar("late", reads="x"), scalar("early", reads="a"))
    assert emitted[-3:] == ["early", "Order<HardEvent::V_S>();", "late"]
