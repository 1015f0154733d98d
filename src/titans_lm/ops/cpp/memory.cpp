// What Python calls, for one type of number: Number, given to the compiler.

#include <atomic>
#include <thread>

#include "back_reader.h"
#include "features.h"
#include "step.h"

// Jobs are handed out one by one to `threads` threads, each with buffers of its own.
template <class Worker, class Call, class Act>
void share(const Call& call, long jobs, Act act) {
    std::atomic<long> next{0};
    auto work = [&] {
        Worker worker(call);
        for (long job; (job = next++) < jobs;) act(worker, job);
    };
    std::vector<std::thread> others;
    for (long i = 1; i < std::min(call.threads, jobs); ++i) others.emplace_back(work);
    work();
    for (std::thread& t : others) t.join();
}

extern "C" {
long titans_state(const Call<Number>* call) { return Plan<Number>(call->width, call->widths, call->layers).state; }
long titans_trace(const Call<Number>* call) { return Plan<Number>(call->width, call->widths, call->layers).trace; }
void titans_read(const Call<Number>* call) {
    share<Reader<Number>>(*call, call->batch * call->heads, [](Reader<Number>& reader, long r) { reader.read(r); });
}
void titans_back(const Call<Number>* call) {
    share<BackReader<Number>>(*call, call->batch * call->heads,
                              [](BackReader<Number>& reader, long r) { reader.back(r); });
}
void titans_step(const Call<Number>* call) {
    share<Stepper<Number>>(*call, call->batch * call->heads, [](Stepper<Number>& stepper, long r) { stepper.step(r); });
}
void titans_make(const Features<Number>* call) {
    share<Maker<Number>>(*call, call->parts * call->heads, [](Maker<Number>& maker, long job) { maker.make(job); });
}
void titans_back_make(const Features<Number>* call) {
    share<Maker<Number>>(*call, call->parts * call->heads, [](Maker<Number>& maker, long job) { maker.back(job); });
}
}
