// What `native.py` calls, for one type of number: Number, given to the compiler.

#include <atomic>
#include <thread>

#include "back_reader.h"
#include "step.h"

// Rows are handed out one by one to `threads` threads, each with buffers of its own.
template <class Worker, class Act>
void each_row(const Call<Number>& call, Act act) {
    std::atomic<long> next{0};
    long rows = call.batch * call.heads;
    auto work = [&] {
        Worker worker(call);
        for (long r; (r = next++) < rows;) act(worker, r);
    };
    std::vector<std::thread> others;
    for (long i = 1; i < std::min(call.threads, rows); ++i) others.emplace_back(work);
    work();
    for (std::thread& t : others) t.join();
}

extern "C" {
long titans_state(const Call<Number>* call) { return Plan<Number>(call->width, call->widths, call->layers).state; }
long titans_trace(const Call<Number>* call) { return Plan<Number>(call->width, call->widths, call->layers).trace; }
void titans_read(const Call<Number>* call) {
    each_row<Reader<Number>>(*call, [](Reader<Number>& reader, long r) { reader.read(r); });
}
void titans_back(const Call<Number>* call) {
    each_row<BackReader<Number>>(*call, [](BackReader<Number>& reader, long r) { reader.back(r); });
}
void titans_step(const Call<Number>* call) {
    each_row<Stepper<Number>>(*call, [](Stepper<Number>& stepper, long r) { stepper.step(r); });
}
}
