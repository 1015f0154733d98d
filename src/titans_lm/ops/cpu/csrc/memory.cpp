// What Python calls, for one type of number: Number, given to the compiler.

#include <atomic>
#include <new>
#include <thread>

#include "back_reader.h"
#include "token_features.h"
#include "step.h"

// Jobs are handed out one by one to `threads` threads, or as many as the system gives, each with buffers of its own.
// (The counter is locked at its end too: what a worker has streamed past the caches is then there for all.) 0, or 1
// where memory ran out.
template <class Worker, class Call, class Act>
long share(const Call& call, long jobs, Act act) {
    std::atomic<long> next{0}, failed{0};
    auto work = [&] {
        try {
            Worker worker(call);
            for (long job; (job = next++) < jobs;) act(worker, job);
        } catch (const std::bad_alloc&) {
            failed = 1;
        }
    };
    std::vector<std::thread> others;
    try {
        for (long i = 1; i < std::min(call.threads, jobs); ++i) others.emplace_back(work);
    } catch (const std::exception&) {
    }
    work();
    for (std::thread& t : others) t.join();
    return failed;
}

extern "C" {
long titans_state(const Call<Number>* call) { return Plan<Number>(call->width, call->widths, call->layers).state; }
long titans_trace(const Call<Number>* call) { return Plan<Number>(call->width, call->widths, call->layers).trace; }
long titans_read(const Call<Number>* call) {
    return share<Reader<Number>>(*call, call->batch * call->heads,
                                 [](Reader<Number>& reader, long r) { reader.read(r); });
}
long titans_back(const Call<Number>* call) {
    return share<BackReader<Number>>(*call, call->batch * call->heads,
                                     [](BackReader<Number>& reader, long r) { reader.back(r); });
}
long titans_step(const Call<Number>* call) {
    return share<Stepper<Number>>(*call, call->batch * call->heads,
                                  [](Stepper<Number>& stepper, long r) { stepper.step(r); });
}
long titans_make(const Features<Number>* call) {
    return share<Maker<Number>>(*call, call->parts * call->heads,
                                [](Maker<Number>& maker, long job) { maker.make(job); });
}
long titans_back_make(const Features<Number>* call) {
    return share<Maker<Number>>(*call, call->parts * call->heads,
                                [](Maker<Number>& maker, long job) { maker.back(job); });
}
}
