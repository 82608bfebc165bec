# risky_migrations: build, install and test through PGXS.
#
#   make                  build; make STRICT=1 turns warnings into errors
#   make install          install into the PostgreSQL of PG_CONFIG
#   make installcheck     run all suites against a running server
#   make demo [ROWS=n]    the comparison on a throwaway server
#   make check-all        all suites on throwaway servers, every version
#   make lint             warnings, cppcheck, the version
#   make format           pgindent
#
# The version is in risky_migrations.control and nowhere else.

EXTENSION = risky_migrations
MODULE_big = risky_migrations
PGFILEDESC = "risky_migrations - change a column's type without the outage"

# The directory of this file; not the current one in a VPATH build.
top := $(dir $(firstword $(MAKEFILE_LIST)))
in_top = $(sort $(patsubst $(top)%,%,$(wildcard $(addprefix $(top),$(1)))))
names = $(basename $(notdir $(call in_top,$(1))))

DATA = $(call in_top,sql/risky_migrations--*.sql)
OBJS = $(patsubst %.c,%.o,$(call in_top,src/*.c))

# Every file is a test: none is listed by hand.  pg_regress runs the names of
# a list one after the other.  test/expected is a link to expected.
REGRESS = $(call names,test/sql/*.sql)
REGRESS_OPTS = --inputdir=$(srcdir)/test
ISOLATION = $(call names,test/specs/*.spec)
ISOLATION_OPTS = --inputdir=$(srcdir)/test
PROVE_TESTS = $(call in_top,test/t/*.pl)
ifneq ($(PROVE_TESTS),)
TAP_TESTS = 1
endif

# What a change may not add.  The exceptions are for PostgreSQL's own headers
# and idioms: unused arguments of callbacks, int against size_t, {0}.
STRICT_CFLAGS = -Wall -Wextra -Werror -Wno-unused-parameter \
	-Wno-sign-compare -Wno-missing-field-initializers
ifeq ($(STRICT),1)
PG_CFLAGS += $(STRICT_CFLAGS)
endif

PG_CONFIG ?= pg_config
PGXS := $(wildcard $(shell $(PG_CONFIG) --pgxs 2>/dev/null))

ifneq ($(PGXS),)
# A PostgreSQL built for just-in-time compilation wants bitcode from clang;
# where that clang is missing, the extension is built without.
clang := $(shell sed -n 's/^CLANG *= *//p' $(dir $(PGXS))../Makefile.global)
ifeq ($(shell command -v $(firstword $(clang) clang) 2>/dev/null),)
override with_llvm := no
endif
include $(PGXS)
else
all install uninstall installcheck clean:
	@echo "no PGXS found through PG_CONFIG=$(PG_CONFIG): install postgresql-server-dev-15" >&2; exit 1
endif

# PGXS does not know which headers an object file depends on.
$(OBJS) $(OBJS:.o=.bc): $(wildcard $(top)src/*.h)

ifneq ($(top),./)
$(shell mkdir -p src)
endif

.PHONY: demo check-all format lint lint-cppcheck lint-build lint-version

demo:
	$(top)tools/demo $(ROWS)

check-all:
	$(top)tools/test 15 17 18

format:
	$(top)tools/format

lint: lint-version lint-cppcheck lint-build

# META.json has to repeat the version as PGXN writes it: 1.0 is 1.0.0 there.
lint-version:
	@version=$$(sed -n "s/^default_version = '\(.*\)'/\1/p" $(top)risky_migrations.control) && \
	test -e $(top)sql/risky_migrations--$$version.sql && \
	test $$(grep '"version"' $(top)META.json | head -n 2 | grep -c "\"$$version.0\"") -eq 2 && \
	grep -q "risky_migrations--$$version.sql" $(top)META.json || \
	{ echo "META.json or sql/ disagrees with the version of risky_migrations.control" >&2; exit 1; }

# With PostgreSQL's headers, whose macros it needs to understand a function at
# all, and without complaints about them.  Takes a minute.
lint-cppcheck:
	cd $(top) && cppcheck --quiet --error-exitcode=1 --inline-suppr \
		-j $$(nproc) --enable=warning,performance,portability \
		--std=c99 --language=c --max-configs=1 -D__GNUC__ -D__x86_64__ -DPG_VERSION_NUM=$(shell $(PG_CONFIG) --version | sed "s/[^0-9]*\([0-9]*\).*/\10000/") \
		-I$(includedir_server) '--suppress=*:$(includedir_server)/*' src

# In a copy: object files in the tree would hide the warnings.
lint-build:
	@build=$$(mktemp -d) && trap 'rm -rf "$$build"' EXIT && \
	cd $(top) && cp -R Makefile risky_migrations.control sql src "$$build" && \
	rm -f "$$build"/src/*.o && \
	$(MAKE) --no-print-directory -s -C "$$build" STRICT=1 with_llvm=no all
