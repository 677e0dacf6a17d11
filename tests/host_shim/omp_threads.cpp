// What the CPU extension needs of OpenMP, over plain threads: ThreadSanitizer understands these,
// and does not understand libgomp's barriers. A team is made and joined for every region.
#include <thread>
#include <vector>

namespace {
int g_threads = 4;
thread_local int t_number = 0, t_team = 1;

void member(void (*run)(void*), void* data, int number, int team) {
  t_number = number, t_team = team;
  run(data);
  t_number = 0, t_team = 1;
}
}  // namespace

extern "C" {

void GOMP_parallel(void (*run)(void*), void* data, unsigned threads, unsigned) {
  const int team = threads ? int(threads) : g_threads;
  std::vector<std::thread> others;
  for (int i = 1; i < team; ++i) others.emplace_back(member, run, data, i, team);
  member(run, data, 0, team);
  for (std::thread& other : others) other.join();
}

int omp_get_max_threads() { return g_threads; }
int omp_get_num_threads() { return t_team; }
int omp_get_thread_num() { return t_number; }

// For the tests, through ctypes: that a race in a parallel region is seen.
__attribute__((visibility("default"))) int shim_race(int atomic) {
  struct Data {
    int atomic, count;
  } data = {atomic, 0};
  GOMP_parallel(
      [](void* given) {
        Data* data = static_cast<Data*>(given);
        for (int i = 0; i < 1000; ++i) {
          if (data->atomic)
            __atomic_fetch_add(&data->count, 1, __ATOMIC_RELAXED);
          else
            ++data->count;
        }
      },
      &data, 0, 0);
  return data.count;
}
}
