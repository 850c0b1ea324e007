// Counts of warps. Whenever all lanes of a warp stand at one place (a barrier, an instruction of the whole warp, the
// end), what they did since the last such place is put together:
//   - basic blocks: where all lanes entered the same ones in the same order, exactly so; else of each block the most
//     often that any one lane entered it.
//   - memory: the k-th execution of an instruction by one lane is one request with the k-th of the others.
#include "ptxcount.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <unordered_map>
#include <vector>

namespace ptx::counts {

uint16_t *trace, *trace_end;
Noted *note, *note_end;

namespace {

template <class T>
struct Log {
  std::vector<T> room = std::vector<T>(1024);
  size_t used = 0;
};
Log<uint16_t> traces[32];
Log<Noted> notes[32];
int lane_now;

struct Group {
  uint32_t mask;
  uint64_t address[32];
  uint16_t size[32];
};
struct Site {
  uint32_t line;
  int kind, size;
  uint64_t requests = 0, lanes = 0, wavefronts = 0, ideal = 0, sectors = 0, bytes = 0, again = 0;
  std::vector<Group> groups;
  size_t used = 0, seen = 0;
  int seen_by = -1;
};
struct Block {
  uint64_t number;
  std::vector<uint32_t> warp;  // executions of each basic block by a warp
};
struct Launch {
  std::string kernel;
  unsigned grid[3], block[3];
  uint64_t shared;
  std::vector<TileKind> kinds;
  std::vector<bool> columns;  // that are run
  std::vector<Block> blocks;
  std::vector<uint64_t> lanes;  // executions of each basic block by a lane
  std::vector<Site> sites;
  uint64_t read_sectors = 0, read_once = 0, written_sectors = 0, written_once = 0, divergent = 0, folds = 0;
};
std::vector<Launch> launches;
std::map<std::string, std::vector<uint32_t>> unused;
std::unordered_map<uint64_t, int> site_of;  // of the present launch, by line and kind
struct Page {
  uint64_t read[2] = {}, written[2] = {};
};
std::unordered_map<uint64_t, Page> pages;  // of 4 KiB: the sectors of 32 bytes that the launch has touched
uint64_t last_page = ~0ull;
Page* last;
std::vector<uint32_t> most, mine;

bool without_products;
int most_columns;  // a launch that deals out tiles runs about so many columns of its grid; 0: all

// Evenly chosen ones; and of each kind of tile that those would hardly meet, four of the first maps that have it.
std::vector<bool> choose_columns(unsigned columns, const std::vector<TileKind>& kinds) {
  const unsigned most = static_cast<unsigned>(most_columns);
  if (most == 0 || columns <= most || kinds.empty()) return std::vector<bool>(columns, true);
  std::vector<bool> out(columns);
  for (unsigned k = 0; k < most; ++k) out[static_cast<unsigned>((k + 0.5) * columns / most)] = true;
  int64_t all = 0;
  for (const TileKind& kind : kinds) all += kind.total;
  for (const TileKind& kind : kinds) {
    if (2 * kind.total * most >= all) continue;
    const auto& tiles = kind.tiles;
    const auto first = std::find_if(tiles.begin(), tiles.end(), [](int64_t n) { return n > 0; });
    const auto last = std::find(first, tiles.end(), 0);
    for (int k = 0; k < 4; ++k) out[first - tiles.begin() + (last - first) * k / 4] = true;
  }
  return out;
}

bool touch(uint64_t sector, bool write) {
  const uint64_t page = sector >> 7;
  if (page != last_page) last = &pages[page], last_page = page;
  uint64_t& word = (write ? last->written : last->read)[sector >> 6 & 1];
  const uint64_t bit = 1ull << (sector & 63), before = word;
  word |= bit;
  return before & bit;
}

// Lanes of one pass over the banks: the most words that one bank has to give.
int passes(const Group& g, int from, int to, unsigned size) {
  uint64_t words[128];
  int count = 0;
  for (int i = from; i < to; ++i)
    if (g.mask >> i & 1)
      for (uint64_t w = g.address[i] >> 2; w <= (g.address[i] + size - 1) >> 2; ++w) words[count++] = w;
  if (count == 0) return 0;
  std::sort(words, words + count);
  count = static_cast<int>(std::unique(words, words + count) - words);
  int of_bank[32] = {}, out = 0;
  for (int i = 0; i < count; ++i) out = std::max(out, ++of_bank[words[i] & 31]);
  return out;
}

void finish_shared(Site& s, const Group& g) {
  const unsigned size = s.size;
  const int step = size <= 4 ? 32 : size == 8 ? 16 : 8;
  for (int i = 0; i < 32; i += step) {
    const int n = passes(g, i, i + step, size);
    s.wavefronts += n;
    s.ideal += n > 0;
  }
  s.bytes += static_cast<uint64_t>(size) * __builtin_popcount(g.mask);
}

void finish_matrices(Site& s, const Group& g) {
  for (int m = 0; m < s.size / 16; ++m) s.wavefronts += passes(g, 8 * m, 8 * m + 8, 16), ++s.ideal;
  s.bytes += 8 * s.size;
}

void finish_global(Launch& l, Site& s, const Group& g) {
  const bool write = s.kind == kGlobal + 1 || s.kind == kGlobal + 2;
  uint64_t sectors[64];
  uint32_t used[64];
  int count = 0;
  for (int i = 0; i < 32; ++i) {
    if (!(g.mask >> i & 1) || g.size[i] == 0) continue;
    const uint64_t a = g.address[i], end = a + g.size[i];
    for (uint64_t sector = a >> 5; sector <= (end - 1) >> 5; ++sector) {
      const uint64_t lo = std::max(a, sector << 5) & 31, hi = std::min(end, (sector + 1) << 5) - (sector << 5);
      const uint32_t bits = static_cast<uint32_t>(((1ull << hi) - 1) & ~((1ull << lo) - 1));
      int k = count - 1;
      while (k >= 0 && sectors[k] != sector) --k;
      if (k < 0) k = count++, sectors[k] = sector, used[k] = 0;
      used[k] |= bits;
    }
  }
  for (int k = 0; k < count; ++k) {
    s.bytes += __builtin_popcount(used[k]);
    const bool again = touch(sectors[k], write);
    s.again += again;
    (write ? l.written_sectors : l.read_sectors)++;
    if (!again) (write ? l.written_once : l.read_once)++;
  }
  s.sectors += count;
}

}  // namespace

void grow_trace() {
  Log<uint16_t>& t = traces[lane_now];
  const size_t used = trace - t.room.data();
  t.room.resize(2 * t.room.size());
  trace = t.room.data() + used, trace_end = t.room.data() + t.room.size();
}
void grow_notes() {
  Log<Noted>& t = notes[lane_now];
  const size_t used = note - t.room.data();
  t.room.resize(2 * t.room.size());
  note = t.room.data() + used, note_end = t.room.data() + t.room.size();
}
void resume(int lane) {
  lane_now = lane;
  trace = traces[lane].room.data() + traces[lane].used, trace_end = traces[lane].room.data() + traces[lane].room.size();
  note = notes[lane].room.data() + notes[lane].used, note_end = notes[lane].room.data() + notes[lane].room.size();
}
void suspend(int lane) {
  traces[lane].used = trace - traces[lane].room.data();
  notes[lane].used = note - notes[lane].room.data();
}

void fold(int, int lanes) {
  Launch& l = launches.back();
  std::vector<uint32_t>& warp = l.blocks.back().warp;
  bool same = true;
  size_t longest = 0;
  for (int i = 0; i < lanes; ++i) {
    longest = std::max(longest, traces[i].used);
    same = same && traces[i].used == traces[0].used &&
           memcmp(traces[i].room.data(), traces[0].room.data(), 2 * traces[0].used) == 0;
  }
  if (longest == 0) return;
  const auto room = [&](size_t block) {
    if (block >= l.lanes.size()) l.lanes.resize(block + 64);
    if (block >= warp.size()) warp.resize(l.lanes.size());
  };
  ++l.folds;
  if (same) {
    for (size_t k = 0; k < traces[0].used; ++k) {
      const uint16_t b = traces[0].room[k];
      room(b);
      ++warp[b];
      l.lanes[b] += lanes;
    }
  } else {
    ++l.divergent;
    std::vector<uint16_t> touched;
    for (int i = 0; i < lanes; ++i) {
      for (size_t k = 0; k < traces[i].used; ++k) {
        const uint16_t b = traces[i].room[k];
        room(b);
        if (mine.size() < l.lanes.size()) mine.resize(l.lanes.size()), most.resize(l.lanes.size());
        ++mine[b];
        ++l.lanes[b];
      }
      for (size_t k = 0; k < traces[i].used; ++k) {
        const uint16_t b = traces[i].room[k];
        if (mine[b] > most[b]) {
          if (most[b] == 0) touched.push_back(b);
          most[b] = mine[b];
        }
        mine[b] = 0;
      }
    }
    for (const uint16_t b : touched) warp[b] += most[b], most[b] = 0;
  }
  // Memory
  static std::vector<int> touched;
  touched.clear();
  static int stamp = 0;
  for (int i = 0; i < lanes; ++i) {
    traces[i].used = 0;
    ++stamp;
    uint64_t key_before = ~0ull;
    int index = -1;
    for (size_t k = 0; k < notes[i].used; ++k) {
      const Noted& n = notes[i].room[k];
      const uint64_t key = static_cast<uint64_t>(n.line) << 8 | n.kind;
      if (key != key_before) {
        const auto found = site_of.try_emplace(key, static_cast<int>(l.sites.size()));
        if (found.second) {
          l.sites.emplace_back();
          l.sites.back().line = n.line, l.sites.back().kind = n.kind;
        }
        index = found.first->second, key_before = key;
      }
      Site& s = l.sites[index];
      if (s.seen_by != stamp) s.seen_by = stamp, s.seen = 0;
      if (s.seen == s.used) {
        if (s.used == 0) touched.push_back(index);
        if (s.used == s.groups.size()) s.groups.emplace_back();
        s.groups[s.used].mask = 0;
        ++s.used;
      }
      Group& g = s.groups[s.seen++];
      g.mask |= 1u << i;
      g.address[i] = n.address;
      g.size[i] = n.size;
      s.size = std::max<int>(s.size * (s.requests > 0 || s.used > 0), n.size);
    }
    notes[i].used = 0;
  }
  for (const int index : touched) {
    Site& s = l.sites[index];
    for (size_t k = 0; k < s.used; ++k) {
      const Group& g = s.groups[k];
      ++s.requests;
      s.lanes += __builtin_popcount(g.mask);
      if (s.kind >= kMatrices)
        finish_matrices(s, g);
      else if (s.kind >= kGlobal)
        finish_global(l, s, g);
      else
        finish_shared(s, g);
    }
    s.used = 0;
  }
}

void begin(const std::string& kernel, const unsigned* grid, const unsigned* block, uint64_t shared,
           const std::vector<TileKind>& kinds) {
  if (!launches.empty())
    for (Site& s : launches.back().sites) s.groups.clear(), s.groups.shrink_to_fit();
  launches.emplace_back();
  Launch& l = launches.back();
  l.kernel = kernel, l.shared = shared;
  if (!kinds.empty() && kinds[0].tiles.size() == grid[0]) l.kinds = kinds;
  l.columns = choose_columns(grid[0], l.kinds);
  std::copy(grid, grid + 3, l.grid);
  std::copy(block, block + 3, l.block);
  site_of.clear();
  pages.clear();
  last_page = ~0ull;
  for (int i = 0; i < 32; ++i) traces[i].used = notes[i].used = 0;
}

void block(uint64_t number) {
  launches.back().blocks.push_back({number, std::vector<uint32_t>(launches.back().lanes.size())});
}

bool skips_products() { return without_products; }

bool wanted(uint64_t number) {
  const Launch& l = launches.back();
  return l.columns[number % l.grid[0]];
}

}  // namespace ptx::counts

#define PTXRUN_EXPORT extern "C" __attribute__((visibility("default")))

// How the launches that follow are counted. columns: of launches that deal out tiles about so many columns of the grid
// are run; 0: all. products: those of matrices are computed. leave_out: other kernels than those of the module do
// nothing.
namespace ptx {
extern bool leave_out;
}
PTXRUN_EXPORT void ptxrun_count(int columns, int products, int leave_out) {
  ptx::counts::most_columns = columns;
  ptx::counts::without_products = !products;
  ptx::leave_out = leave_out;
}

// Writes what was counted so far as JSON, and forgets it.
PTXRUN_EXPORT int ptxrun_count_write(const char* path) {
  using namespace ptx::counts;
  FILE* const f = fopen(path, "w");
  if (!f) return 1;
  fprintf(f, "[");
  for (size_t i = 0; i < launches.size(); ++i) {
    const Launch& l = launches[i];
    fprintf(f,
            "%s{\"kernel\": \"%s\", \"grid\": [%u, %u, %u], \"block\": [%u, %u, %u], \"shared\": %llu, \"folds\": "
            "%llu, \"divergent\": %llu,\n",
            i ? ",\n" : "", l.kernel.c_str(), l.grid[0], l.grid[1], l.grid[2], l.block[0], l.block[1], l.block[2],
            (unsigned long long)l.shared, (unsigned long long)l.folds, (unsigned long long)l.divergent);
    fprintf(f,
            " \"sectors\": {\"read\": %llu, \"read_once\": %llu, \"written\": %llu, \"written_once\": %llu},\n "
            "\"lanes\": [",
            (unsigned long long)l.read_sectors, (unsigned long long)l.read_once, (unsigned long long)l.written_sectors,
            (unsigned long long)l.written_once);
    for (size_t k = 0; k < l.lanes.size(); ++k) fprintf(f, "%s%llu", k ? "," : "", (unsigned long long)l.lanes[k]);
    fprintf(f, "],\n \"kinds\": [");
    for (size_t k = 0; k < l.kinds.size(); ++k) {
      const ptx::TileKind& kind = l.kinds[k];
      fprintf(f, "%s[%d, %lld, %lld, [", k ? ",\n  " : "", kind.losses, (long long)kind.height, (long long)kind.width);
      for (size_t c = 0; c < kind.tiles.size(); ++c) fprintf(f, "%s%lld", c ? "," : "", (long long)kind.tiles[c]);
      fprintf(f, "]]");
    }
    fprintf(f, "],\n \"blocks\": {");
    for (size_t b = 0; b < l.blocks.size(); ++b) {
      fprintf(f, "%s\"%llu\": [", b ? ",\n  " : "", (unsigned long long)l.blocks[b].number);
      for (size_t k = 0; k < l.blocks[b].warp.size(); ++k) fprintf(f, "%s%u", k ? "," : "", l.blocks[b].warp[k]);
      fprintf(f, "]");
    }
    fprintf(f, "},\n \"sites\": [");
    for (size_t k = 0; k < l.sites.size(); ++k) {
      const Site& s = l.sites[k];
      fprintf(f, "%s[%u,%d,%d,%llu,%llu,%llu,%llu,%llu,%llu,%llu]", k ? ",\n  " : "", s.line, s.kind, s.size,
              (unsigned long long)s.requests, (unsigned long long)s.lanes, (unsigned long long)s.wavefronts,
              (unsigned long long)s.ideal, (unsigned long long)s.sectors, (unsigned long long)s.bytes,
              (unsigned long long)s.again);
    }
    fprintf(f, "]}");
  }
  fprintf(f, "]\n");
  fclose(f);
  launches.clear();
  return 0;
}

namespace {
struct AtExit {  // with PTXRUN_COUNT_FILE: of any run, the project's tests for example
  ~AtExit() {
    if (const char* const path = getenv("PTXRUN_COUNT_FILE"); path && !ptx::counts::launches.empty())
      ptxrun_count_write(path);
  }
} at_exit;
}  // namespace
