/*-------------------------------------------------------------------------
 *
 * crew.c
 *	  Several processes for one step, on disjoint ranges of pages.
 *
 * Where a step goes through a table page by page, and
 * risky_migrations.workers allows it, its runner cuts the pages that are left
 * into ranges and has helpers, dynamic background workers, work on them beside
 * itself:
 *
 *	  runner										helper
 *	  cut the pages into ranges: rows of the
 *	  table range, in its own transaction
 *	  order into a DSM segment, register  ------->	attach, connect as the
 *													session's user, become the
 *													role, settings
 *	  tend the crew; then one transaction:			while it may go on, one
 *		take a range, or go on with its own,		transaction: the same
 *		do some of it, save how far it is
 *	  ... until no range is left: count together
 *
 * What is done is said by the rows of range alone.  A range's row is locked,
 * and saved, in the transaction that works on it, so after a crash at any
 * instant each page is done or not done, and only what was under way is lost
 * with its work.  The runner's order of its own crash safety holds for helpers
 * too: they commit without waiting for the disk, and the transaction in which
 * the runner finds all ranges done comes after theirs in the WAL.
 *
 * Who works on what: range.run is the step log's id of the runner's run, and
 * range.worker the helper's number in it (0: the runner).  A helper takes a
 * range that nobody has; the runner takes also one whose helper has gone.  A
 * run begins by putting its own id into all rows, for which it waits until
 * nobody has them locked.  So whoever is left over from an earlier run finds no
 * range any more, whatever became of its runner: at no time do two processes
 * work on the same pages.
 *
 * The state row is the runner's alone: a helper reads it and never waits for
 * it.  Nor does the runner, which holds it, wait for a helper but for the end of
 * a transaction that has a range locked, and that one waits for no lock of the
 * runner's (they lock the same table in modes that do not conflict, and rows on
 * different pages).
 *
 * A helper goes on only as long as the runner says so (go_until), for that one
 * throttles, and obeys pauses.  When the runner rests for the sake of others
 * all of them rest; when it is paused, cancelled or fails, or has come to the
 * end, they go.  A runner that exits takes them along; and should that fail,
 * go_until passes by itself.
 *
 * Helpers may also do something else than the runner (run->aside): it goes its way, and
 * offers them ranges as there is something to do for them, which it neither takes nor waits
 * for (m->ranges is 0).  It may be in one transaction for hours meanwhile: for them
 * go_until is without end, and they go when the runner says so, or is not there any more.
 *
 * What fails in a helper is tried again there where it would be in the runner;
 * other errors end it, and the runner raises them as its own.  A helper that
 * was terminated, or could not be had for want of a worker or of shared memory, is
 * no error: the others do the work, and after a while the runner asks for another
 * one.
 *
 * Easy to get wrong:
 *
 *	The step must work in a helper as it does in the runner, but nothing that it
 *	changes in run->m is saved there, and notices of a helper go nowhere.
 *
 *	A range belongs to one relfilenode.  Whoever finds another one does nothing;
 *	the runner will throw the ranges away, and those that it cuts then have the
 *	same numbers: what a step remembers of a range is about one that it goes on
 *	with, never about one that is fresh.
 *
 *	What is shared out, and what is offered to helpers aside, are ranges of one table, and
 *	a runner that changes from one to the other may rest before it sends those helpers
 *	away: m->ranges says what a range is for, and a helper looks at it when it has taken
 *	one.
 *
 *	The last sums of a helper are known when it has gone, which may be after
 *	its last range was seen to be done: a step sends the crew away before the
 *	transaction that ends it.
 *
 * Copyright (c) 2026, risky_migrations contributors
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <signal.h>

#include "access/xact.h"
#include "catalog/pg_type.h"
#include "compat.h"
#include "crew.h"
#include "executor/instrument.h"
#include "executor/spi.h"
#include "fmgr.h"
#include "miscadmin.h"
#include "port/atomics.h"
#include "postmaster/bgworker.h"
#include "postmaster/interrupt.h"
#include "risky_migrations.h"
#include "state.h"
#include "storage/dsm.h"
#include "storage/ipc.h"
#include "storage/latch.h"
#include "storage/proc.h"
#include "storage/procarray.h"
#include "tcop/tcopprot.h"
#include "throttle.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/guc.h"
#include "utils/memutils.h"
#include "utils/resowner.h"
#include "utils/snapmgr.h"
#include "utils/timestamp.h"
#include "worker.h"

#define CREW_MAGIC 0x726d6331

/* ranges for each worker, so that they end at about the same time; the last one in parts */
#define RANGES_PER_WORKER 8
#define LAST_PARTS 4
/* and the most pages of one of them: 1 GB */
#define MAX_RANGE_PAGES (128 * 1024)
/* how long a helper goes on without hearing of its runner, milliseconds */
#define LEASE 10000
/* how often a helper that has nothing to do looks by itself, milliseconds */
#define IDLE_LOOK 100
/* helpers that were not to be had are asked for again after this, milliseconds */
#define ASK_AGAIN 10000
/* how long the sums over all ranges are believed, milliseconds */
#define SUMS_AGE 500
/* how long to wait for a helper that was told to go, then terminated, ms */
#define STOP_PATIENCE 1000
#define TERMINATE_PATIENCE 9000

/* what the numbers of a helper are about, in its berth */
enum
{
	SUM_TRANSACTIONS,
	SUM_BATCHES,
	SUM_ROWS_CHANGED,
	SUM_ROWS_HOT,
	SUM_LOCK_RETRIES,
	SUM_WAL_BYTES,
	NSUMS
};

/* a helper's place in the segment */
typedef struct Berth
{
	/* written by the runner before the helper exists */
	int			number;
	/* written by the runner at any time */
	pg_atomic_uint32 stop;		/* go when the transaction is through */
	/* written by the helper */
	bool		attached;
	pg_atomic_uint32 connected;
	pg_atomic_uint64 sums[NSUMS];
	/* written by the helper before it ends, read when it has gone */
	bool		failed;
	bool		done;
	RmReport	error;
} Berth;

/* what the runner and its helpers share */
typedef struct CrewSegment
{
	uint32		magic;

	/* the order */
	Oid			database;
	Oid			session_user;
	Oid			role;
	int64		migration_id;
	int			step_index;
	int			batch;
	int64		log_id;			/* of the runner's run */
	int			runner_pid;
	bool		aside;
	int			nsettings;

	pg_atomic_uint64 go_until;	/* a TimestampTz; 0: rest */
	pg_atomic_uint32 news;		/* counts times at which ranges were cut */

	Berth		berths[RM_MAX_WORKERS - 1];
	char		settings[FLEXIBLE_ARRAY_MEMBER];	/* name=value, one after
													 * the other */
} CrewSegment;

/* the crew as its runner knows it; lives in the step's memory */
struct RmCrew
{
	dsm_segment *dsm;
	CrewSegment *shared;
	BackgroundWorkerHandle *handles[RM_MAX_WORKERS - 1];	/* NULL: empty */
	int			numbers;		/* that have been given away */
	bool		holding;
	bool		told;			/* that fewer are to be had than wanted */
	TimestampTz ask_next;
};

/* in a helper: its order's beginning, in bgw_extra */
typedef struct HelperOrder
{
	dsm_handle	handle;
	int			berth;
	int			number;
} HelperOrder;

PGDLLEXPORT void rm_helper_main(Datum main_arg);
PG_FUNCTION_INFO_V1(rm_help);

/* in the runner: the crew to be taken along when this process exits */
static RmCrew *crew_of_process = NULL;

/* in a helper */
static CrewSegment *segment = NULL;
static Berth *berth = NULL;
static uint32 news_seen = 0;

/*-------------------------------------------------------------------------
 * Ranges
 *-------------------------------------------------------------------------
 */

/* what a range has a multiple of: as the step says, but for tests */
static int
range_pages(int multiple_of)
{
	return rm_range_pages > 0 ? rm_range_pages : multiple_of;
}

/*
 * How many processes are worth their while for so many pages, of which a range
 * has a multiple of multiple_of?
 */
int
rm_workers_for(int64 blocks, int multiple_of)
{
	return (int) Max(1, Min(rm_workers, blocks / range_pages(multiple_of)));
}

/*
 * The same of helpers whose work is not the runner's, who has enough to do: one at least,
 * but 0 if it is not worth the while.
 */
int
rm_helpers_aside_for(int64 blocks, int multiple_of)
{
	return blocks < range_pages(multiple_of) ? 0 : Max(1, rm_workers_for(blocks, multiple_of) - 1);
}

/* more ranges, for so many workers; returns how many */
static int
add_ranges(RmRun *run, Oid relid, int64 first_block, int64 end_block, int workers, int multiple_of)
{
	RmMigration *m = run->m;
	Oid			types[] = {INT8OID, OIDOID, OIDOID, INT8OID, INT8OID, INT8OID, INT8OID, INT8OID, INT8OID};
	Datum		v[lengthof(types)];
	int64		blocks = end_block - first_block;
	int64		pages = Min(blocks / ((int64) workers * RANGES_PER_WORKER), MAX_RANGE_PAGES);
	int64		last_pages;
	int64		last;

	multiple_of = range_pages(multiple_of);
	pages = Max(1, pages / multiple_of) * multiple_of;
	last_pages = Max(1, pages / LAST_PARTS / multiple_of) * multiple_of;
	last = first_block + Max(0, blocks / pages - workers) * pages;
	v[0] = Int64GetDatum(m->id);
	v[1] = ObjectIdGetDatum(relid);
	v[2] = ObjectIdGetDatum(m->relfilenode);
	v[3] = Int64GetDatum(first_block);
	v[4] = Int64GetDatum(end_block);
	v[5] = Int64GetDatum(pages);
	v[6] = Int64GetDatum(last);
	v[7] = Int64GetDatum(last_pages);
	v[8] = Int64GetDatum(run->log_id);
	rm_state_execute("INSERT INTO risky_migrations.range (migration_id, number, relid,"
					 " relfilenode, first_block, next_block, end_block, run)"
					 " SELECT $1, before + row_number() OVER (ORDER BY b), $2, $3, b, b, lead(b, 1, $5) OVER (ORDER BY b), $9"
					 " FROM (SELECT * FROM pg_catalog.generate_series($4, $7 - 1, $6)"
					 "  UNION ALL SELECT * FROM pg_catalog.generate_series($7, $5 - 1, $8)) s(b),"
					 "  (SELECT coalesce(max(number), 0) AS before FROM risky_migrations.range"
					 "   WHERE migration_id = $1) r",
					 lengthof(types), types, v, NULL);
	run->ranges_new = true;
	return (int) SPI_processed;
}

/*
 * Cuts what is left of the pages of relid, [m->next_block, m->end_block), into
 * ranges.
 */
void
rm_ranges_cut(RmRun *run, Oid relid, int workers, int multiple_of)
{
	RmMigration *m = run->m;

	rm_ranges_forget(m);
	m->ranges = add_ranges(run, relid, m->next_block, m->end_block, workers, multiple_of);
	run->range.number = 0;
}

/* gives these pages of relid (of its storage m->relfilenode) to run->helpers helpers aside */
void
rm_ranges_offer(RmRun *run, Oid relid, int64 first_block, int64 end_block, int multiple_of)
{
	(void) add_ranges(run, relid, first_block, end_block, run->helpers, multiple_of);
}

/*
 * No range is known, nobody works on any.  Waits for the end of the transactions of those
 * who do.
 */
void
rm_ranges_forget(RmMigration *m)
{
	Oid			types[] = {INT8OID};
	Datum		v[] = {Int64GetDatum(m->id)};

	rm_state_execute("DELETE FROM risky_migrations.range WHERE migration_id = $1",
					 1, types, v, NULL);
	m->ranges = 0;
}

/* numbers of the helpers that are there; NULL in a helper, which need not know */
static Datum
numbers_present(const RmRun *run, char *null)
{
	Datum		numbers[RM_MAX_WORKERS];
	int			n = 0;

	*null = ' ';
	if (run->helper > 0)
	{
		*null = 'n';
		return (Datum) 0;
	}
	for (int i = 0; run->crew && i < RM_MAX_WORKERS - 1; i++)
		if (run->crew->handles[i])
			numbers[n++] = Int32GetDatum(run->crew->shared->berths[i].number);
	return PointerGetDatum(construct_array(numbers, n, INT4OID, sizeof(int32), true,
										   TYPALIGN_INT));
}

#define RANGE_COLUMNS "number::int8, relid, relfilenode, next_block, end_block," \
	" rows_checked, rows_changed, rows_failed, rows_nulled"

/* run->range from the row that was found; false if there was none */
static bool
read_range(RmRun *run)
{
	RmRange    *range = &run->range;

	memset(range, 0, sizeof(RmRange));
	if (SPI_processed == 0)
		return false;
	range->number = rm_result_int64(0, 1);
	range->relid = DatumGetObjectId(rm_result_datum(0, 2));
	range->relfilenode = DatumGetObjectId(rm_result_datum(0, 3));
	range->next_block = rm_result_int64(0, 4);
	range->end_block = rm_result_int64(0, 5);
	range->rows_checked = rm_result_int64(0, 6);
	range->rows_changed = rm_result_int64(0, 7);
	range->rows_failed = rm_result_int64(0, 8);
	range->rows_nulled = rm_result_int64(0, 9);
	return true;
}

/*
 * Takes a range into run->range, and locks its row: the one that was worked on
 * before, if it is still ours and not done, or else one that is free (and fresh).
 */
RmRangeTaken
rm_range_take(RmRun *run)
{
	Oid			types[] = {INT8OID, INT8OID, INT4OID, INT4OID};
	Oid			claim_types[] = {INT8OID, INT8OID, INT4OID, INT4ARRAYOID};
	Datum		v[] = {Int64GetDatum(run->migration_id), Int64GetDatum(run->log_id),
	Int32GetDatum(run->helper), Int32GetDatum(run->range.number)};
	char		n[] = "    ";

	if (run->range.number > 0)
	{
		rm_state_execute("SELECT " RANGE_COLUMNS " FROM risky_migrations.range"
						 " WHERE migration_id = $1 AND run = $2 AND worker = $3 AND number = $4"
						 " AND next_block < end_block FOR NO KEY UPDATE",
						 4, types, v, NULL);
		if (read_range(run))
			return RM_RANGE_TAKEN;
	}
	/* the beginning of a run: nobody of an earlier one finds anything any more */
	if (run->helper == 0)
	{
		rm_state_execute("UPDATE risky_migrations.range SET run = $2, worker = NULL"
						 " WHERE migration_id = $1 AND run <> $2", 2, types, v, NULL);
		if (SPI_processed > 0)
		{
			/* to be committed whatever becomes of the work: helpers wait for it */
			run->ranges_new = true;
			run->range.number = 0;
			return RM_RANGE_NONE_FREE;
		}
	}
	v[3] = numbers_present(run, &n[3]);
	rm_state_execute("SELECT " RANGE_COLUMNS " FROM risky_migrations.range"
					 " WHERE migration_id = $1 AND run = $2 AND next_block < end_block"
					 " AND (worker IS NULL OR worker = $3 OR worker <> ALL ($4))"
					 " ORDER BY number LIMIT 1 FOR NO KEY UPDATE SKIP LOCKED",
					 4, claim_types, v, n);
	if (read_range(run))
	{
		run->range.fresh = true;
		return RM_RANGE_TAKEN;
	}
	rm_state_execute("SELECT FROM risky_migrations.range"
					 " WHERE migration_id = $1 AND next_block < end_block LIMIT 1",
					 1, types, v, NULL);
	return SPI_processed == 0 ? RM_RANGE_ALL_DONE : RM_RANGE_NONE_FREE;
}

/* all ranges that are left are others': the runner rests, and says why */
void
rm_range_wait(RmRun *run)
{
	run->pause_ms = RM_LOOK_AT_OTHERS;
	run->wait_for_helpers = true;
	run->wait_kind = "helper";
	run->wait_reason = "the last pages are those that helpers work on";
}

/* writes down how far the range is, at the end of the transaction that took it */
void
rm_range_save(RmRun *run)
{
	RmRange    *range = &run->range;
	Oid			types[] = {INT8OID, INT8OID, INT4OID, INT8OID, INT8OID, INT8OID,
	INT8OID, INT8OID};
	Datum		v[] = {Int64GetDatum(run->migration_id), Int64GetDatum(range->number),
		Int32GetDatum(run->helper), Int64GetDatum(range->next_block),
		Int64GetDatum(range->rows_checked), Int64GetDatum(range->rows_changed),
	Int64GetDatum(range->rows_failed), Int64GetDatum(range->rows_nulled)};

	rm_state_execute("UPDATE risky_migrations.range SET worker = $3, next_block = $4,"
					 " rows_checked = $5, rows_changed = $6, rows_failed = $7, rows_nulled = $8"
					 " WHERE migration_id = $1 AND number = $2", lengthof(types), types, v, NULL);
}

/*
 * The pages are not shared out: they are one range, and the state row says how
 * far it is.
 */
void
rm_range_whole(RmRun *run)
{
	RmMigration *m = run->m;

	memset(&run->range, 0, sizeof(RmRange));
	run->range.relid = OidIsValid(m->leaf) ? m->leaf : m->relid;
	run->range.relfilenode = m->relfilenode;
	run->range.next_block = m->next_block;
	run->range.end_block = m->end_block;
}

/*
 * Sums over all ranges, zero where there are none; for progress not looked up
 * each time.
 */
const RmRangeSums *
rm_ranges_sum(RmRun *run, bool now)
{
	RmRangeSums *sums = &run->range_sums;
	Oid			types[] = {INT8OID};
	Datum		v[] = {Int64GetDatum(run->migration_id)};

	if (run->m->ranges == 0)
		memset(sums, 0, sizeof(RmRangeSums));
	else if (now || rm_elapsed_ms(run->summed_at) >= SUMS_AGE)
	{
		rm_state_execute("SELECT sum(next_block - first_block)::bigint, sum(rows_checked)::bigint,"
						 " sum(rows_changed)::bigint, sum(rows_failed)::bigint, sum(rows_nulled)::bigint"
						 " FROM risky_migrations.range WHERE migration_id = $1", 1, types, v, NULL);
		sums->blocks_done = rm_result_int64(0, 1);
		sums->rows_checked = rm_result_int64(0, 2);
		sums->rows_changed = rm_result_int64(0, 3);
		sums->rows_failed = rm_result_int64(0, 4);
		sums->rows_nulled = rm_result_int64(0, 5);
		INSTR_TIME_SET_CURRENT(run->summed_at);
	}
	return sums;
}

/*-------------------------------------------------------------------------
 * The crew, as its runner sees it
 *-------------------------------------------------------------------------
 */

static void
add_sums(RmCrewSums *sums, Berth *b)
{
	sums->transactions += pg_atomic_read_u64(&b->sums[SUM_TRANSACTIONS]);
	sums->batches += pg_atomic_read_u64(&b->sums[SUM_BATCHES]);
	sums->rows_changed += pg_atomic_read_u64(&b->sums[SUM_ROWS_CHANGED]);
	sums->rows_hot += pg_atomic_read_u64(&b->sums[SUM_ROWS_HOT]);
	sums->lock_retries += pg_atomic_read_u64(&b->sums[SUM_LOCK_RETRIES]);
	sums->wal_bytes += pg_atomic_read_u64(&b->sums[SUM_WAL_BYTES]);
}

/* what all helpers of this run have done so far, for the step log */
RmCrewSums
rm_crew_sums(const RmRun *run)
{
	RmCrewSums	sums = run->crew_sums;

	if (run->crew == NULL)
		return sums;
	for (int i = 0; i < RM_MAX_WORKERS - 1; i++)
		if (run->crew->handles[i])
			add_sums(&sums, &run->crew->shared->berths[i]);
	return sums;
}

/* processes at work, the runner included */
int
rm_crew_size(const RmRun *run)
{
	int			n = 1;

	for (int i = 0; run->crew && i < RM_MAX_WORKERS - 1; i++)
		if (run->crew->handles[i] &&
			pg_atomic_read_u32(&run->crew->shared->berths[i].connected))
			n++;
	return n;
}

/* wakes a process if it rests, and is there */
static void
wake(pid_t pid)
{
	PGPROC	   *proc = BackendPidGetProc(pid);

	if (proc)
		SetLatch(&proc->procLatch);
}

static void
wake_helpers(RmCrew *crew)
{
	for (int i = 0; i < RM_MAX_WORKERS - 1; i++)
	{
		pid_t		pid;

		if (crew->handles[i] &&
			GetBackgroundWorkerPid(crew->handles[i], &pid) == BGWH_STARTED)
			wake(pid);
	}
}

/* this process exits: so do its helpers */
static void
at_exit(int code, Datum arg)
{
	for (int i = 0; crew_of_process && i < RM_MAX_WORKERS - 1; i++)
		if (crew_of_process->handles[i])
			TerminateBackgroundWorker(crew_of_process->handles[i]);
	crew_of_process = NULL;
}

/* a segment with the order, and no helpers yet; arg is the RmRun */
static void
make_crew(void *arg)
{
	static bool registered = false;
	RmRun	   *run = arg;
	List	   *settings = rm_session_settings();
	Size		size = 0;
	Size		offset = 0;
	ListCell   *lc;
	RmCrew	   *crew = MemoryContextAllocZero(run->cxt, sizeof(RmCrew));
	CrewSegment *shared;

	if (!registered)
		before_shmem_exit(at_exit, (Datum) 0);
	registered = true;
	foreach(lc, settings)
		size += strlen(lfirst(lc)) + 1;
	crew->dsm = dsm_create(offsetof(CrewSegment, settings) + size, 0);
	crew->shared = shared = dsm_segment_address(crew->dsm);
	memset(shared, 0, offsetof(CrewSegment, settings));
	shared->magic = CREW_MAGIC;
	shared->database = MyDatabaseId;
	shared->session_user = GetSessionUserId();
	shared->role = GetUserId();
	shared->migration_id = run->migration_id;
	shared->step_index = run->step_index;
	shared->batch = run->batch;
	shared->log_id = run->log_id;
	shared->runner_pid = MyProcPid;
	shared->aside = run->aside;
	shared->nsettings = list_length(settings);
	foreach(lc, settings)
	{
		strcpy(shared->settings + offset, lfirst(lc));
		offset += strlen(lfirst(lc)) + 1;
	}
	pg_atomic_init_u64(&shared->go_until, 0);
	pg_atomic_init_u32(&shared->news, 0);
	list_free_deep(settings);

	/* nothing fails from here on */
	dsm_pin_mapping(crew->dsm);
	run->crew = crew;
	crew_of_process = crew;
}

/* asks for one more helper, into an empty berth; false if none is to be had */
static bool
start_helper(RmRun *run, int i)
{
	RmCrew	   *crew = run->crew;
	Berth	   *b = &crew->shared->berths[i];
	HelperOrder order;
	MemoryContext oldcxt;

	memset(b, 0, sizeof(Berth));
	b->number = ++crew->numbers;
	pg_atomic_init_u32(&b->stop, 0);
	pg_atomic_init_u32(&b->connected, 0);
	for (int j = 0; j < NSUMS; j++)
		pg_atomic_init_u64(&b->sums[j], 0);
	memset(&order, 0, sizeof(order));
	order.handle = dsm_segment_handle(crew->dsm);
	order.berth = i;
	order.number = b->number;
	oldcxt = MemoryContextSwitchTo(run->cxt);
	crew->handles[i] = rm_worker_register(psprintf("risky_migrations helper %d of migration %lld",
												   b->number, (long long) run->migration_id),
										  "risky_migrations helper", "rm_helper_main",
										  (Datum) 0, &order, sizeof(order), true, NULL);
	MemoryContextSwitchTo(oldcxt);
	return crew->handles[i] != NULL;
}

/* what raise_error() is given */
typedef struct HelperError
{
	const RmReport *report;
	int			number;
} HelperError;

static void
raise_error(void *arg)
{
	HelperError *e = arg;

	rm_report_repeat(ERROR, e->report, psprintf("helper %d", e->number));
}

/* the helper has gone: its sums are final; its error, if it is one to raise */
static ErrorData *
sign_off(RmRun *run, int i)
{
	RmCrew	   *crew = run->crew;
	Berth	   *b = &crew->shared->berths[i];
	HelperError e = {.report = &b->error,.number = b->number};

	add_sums(&run->crew_sums, b);
	pfree(crew->handles[i]);
	crew->handles[i] = NULL;
	if (b->failed && b->error.sqlerrcode != ERRCODE_ADMIN_SHUTDOWN)
		return rm_try(raise_error, &e, run->cxt);
	if (!b->done)
	{
		/* not even begun, or terminated: no error, but no hurry to replace it */
		ereport(LOG,
				(errmsg("helper %d of migration %lld has ended before its work was done",
						b->number, (long long) run->migration_id),
				 errhint("The others go on with it.")));
		crew->ask_next = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), ASK_AGAIN);
	}
	return NULL;
}

/* signs off those who have gone; the first error of one */
static ErrorData *
muster(RmRun *run)
{
	ErrorData  *error = NULL;

	for (int i = 0; i < RM_MAX_WORKERS - 1; i++)
	{
		pid_t		pid;

		if (run->crew->handles[i] == NULL ||
			GetBackgroundWorkerPid(run->crew->handles[i], &pid) != BGWH_STOPPED)
			continue;
		if (error == NULL)
			error = sign_off(run, i);
		else
			(void) sign_off(run, i);
	}
	return error;
}

/* as many helpers as are wanted now, if they are to be had */
static void
adjust_size(RmRun *run)
{
	RmCrew	   *crew = run->crew;
	TimestampTz now = GetCurrentTimestamp();
	int			n = 0;

	for (int i = 0; i < RM_MAX_WORKERS - 1; i++)
		if (crew->handles[i] && n++ >= run->helpers)
			pg_atomic_write_u32(&crew->shared->berths[i].stop, 1);
	for (int i = 0; i < RM_MAX_WORKERS - 1 && n < run->helpers && now >= crew->ask_next; i++)
	{
		if (crew->handles[i])
			continue;
		if (!start_helper(run, i))
		{
			crew->ask_next = TimestampTzPlusMilliseconds(now, ASK_AGAIN);
			if (!crew->told && !run->aside)
				ereport(NOTICE,
						(errmsg("step %s goes on with %d of %d workers, no more background workers are free",
								run->step->name, n + 1, run->helpers + 1),
						 errhint("More are asked for again as it goes on. max_worker_processes limits them.")));
			crew->told = true;
			break;
		}
		n++;
	}
}

/*
 * Makes the crew.  Where there is no shared memory for it the runner goes on
 * alone, and asks again after a while; an interrupt is returned.
 */
static ErrorData *
raise_crew(RmRun *run)
{
	ErrorData  *error;

	if (GetCurrentTimestamp() < run->crew_next)
		return NULL;
	error = rm_try(make_crew, run, run->cxt);
	if (error == NULL)
		return NULL;
	if (error->sqlerrcode == ERRCODE_QUERY_CANCELED)
		return error;
	ereport(run->crew_next == 0 && !run->aside ? NOTICE : DEBUG1,
			(errmsg("step %s goes on without helpers", run->step->name),
			 errdetail("%s", error->message),
			 errhint("They are asked for again as it goes on.")));
	FreeErrorData(error);
	run->crew_next = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), ASK_AGAIN);
	return NULL;
}

/*
 * Between two transactions of the step, when nothing holds it: raises the crew
 * that the step wants, or sends it away; and tells it to go on.  Returns the
 * error of a helper.
 */
ErrorData *
rm_crew_tend(RmRun *run)
{
	ErrorData  *error;
	RmCrew	   *crew;

	if (run->helpers == 0 || run->revert)
	{
		rm_crew_dismiss(run);
		return NULL;
	}
	if (run->crew && run->crew->shared->aside != run->aside)
		rm_crew_dismiss(run);
	if (run->crew == NULL && !rm_worker_can_be(GetSessionUserId()))
		return NULL;			/* as nobody whom a worker could connect as */
	if (run->crew == NULL)
	{
		error = raise_crew(run);
		if (run->crew == NULL)
			return error;
	}
	crew = run->crew;
	error = muster(run);
	if (error)
		return error;
	adjust_size(run);
	pg_atomic_write_u64(&crew->shared->go_until, run->aside ? DT_NOEND :
						TimestampTzPlusMilliseconds(GetCurrentTimestamp(), LEASE));
	if (crew->holding || run->ranges_new)
	{
		pg_atomic_fetch_add_u32(&crew->shared->news, 1);
		wake_helpers(crew);
	}
	crew->holding = run->ranges_new = false;
	return NULL;
}

/* the runner is about to rest for the sake of others: so do the helpers */
void
rm_crew_hold(RmRun *run)
{
	if (run->crew == NULL)
		return;
	pg_atomic_write_u64(&run->crew->shared->go_until, 0);
	run->crew->holding = true;
}

/* waits until none is left, at most so many milliseconds */
static bool
wait_for_all(RmCrew *crew, int patience)
{
	TimestampTz until = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), patience);

	for (;;)
	{
		bool		left = false;
		long		ms = TimestampDifferenceMilliseconds(GetCurrentTimestamp(), until);
		pid_t		pid;

		for (int i = 0; i < RM_MAX_WORKERS - 1; i++)
			if (crew->handles[i] &&
				GetBackgroundWorkerPid(crew->handles[i], &pid) != BGWH_STOPPED)
				left = true;
		if (!left)
			return true;
		if (ms <= 0)
			return false;
		(void) WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH, ms,
						 WAIT_EVENT_BGWORKER_SHUTDOWN);
		ResetLatch(MyLatch);
	}
}

/*
 * Sends the helpers away and waits until they have gone, which is when their
 * transactions have ended; whoever does not go is terminated.  Nothing can be
 * raised here: it is called also when the step has failed.
 */
void
rm_crew_dismiss(RmRun *run)
{
	RmCrew	   *crew = run->crew;

	if (crew == NULL)
		return;
	rm_crew_hold(run);
	for (int i = 0; i < RM_MAX_WORKERS - 1; i++)
		if (crew->handles[i])
			pg_atomic_write_u32(&crew->shared->berths[i].stop, 1);
	wake_helpers(crew);
	if (!wait_for_all(crew, STOP_PATIENCE))
	{
		for (int i = 0; i < RM_MAX_WORKERS - 1; i++)
			if (crew->handles[i])
				TerminateBackgroundWorker(crew->handles[i]);
		if (!wait_for_all(crew, TERMINATE_PATIENCE))
			ereport(WARNING,
					(errcode(ERRCODE_QUERY_CANCELED),
					 errmsg("a helper of migration %lld did not end within %d s of being terminated",
							(long long) run->migration_id,
							(STOP_PATIENCE + TERMINATE_PATIENCE) / 1000),
					 errhint("It finds nothing to do any more.")));
	}
	for (int i = 0; i < RM_MAX_WORKERS - 1; i++)
		if (crew->handles[i])
			add_sums(&run->crew_sums, &crew->shared->berths[i]);
	crew_of_process = NULL;
	run->crew = NULL;
	dsm_detach(crew->dsm);
	/* the waits may have swallowed a wake-up that was meant for others */
	SetLatch(MyLatch);
}

/*-------------------------------------------------------------------------
 * A helper
 *-------------------------------------------------------------------------
 */

/* for how long a helper rests before it looks again: not past the end of a rest of its own */
static int
look_after(const RmRun *run)
{
	long		ms = TimestampDifferenceMilliseconds(GetCurrentTimestamp(), run->idle_until);

	return ms > 0 ? (int) Min(ms, IDLE_LOOK) : IDLE_LOOK;
}

/*
 * Between two transactions of a helper: waits as long as the runner rests, or it does
 * itself (run->idle_until), or, if idle, until there may be something to do.  False if it
 * is to end.
 */
bool
rm_crew_may_go_on(RmRun *run, bool idle, ErrorData **error)
{
	*error = rm_throttle_reload(run);
	while (*error == NULL)
	{
		uint32		news = pg_atomic_read_u32(&segment->news);

		if (pg_atomic_read_u32(&berth->stop) ||
			BackendPidGetProc(segment->runner_pid) == NULL)
			return false;
		if ((!idle || news != news_seen) && run->idle_until <= GetCurrentTimestamp() &&
			(TimestampTz) pg_atomic_read_u64(&segment->go_until) > GetCurrentTimestamp())
		{
			news_seen = news;
			return true;
		}
		(void) rm_wait_latch(look_after(run), run->cxt, error);
		if (*error == NULL)
			*error = rm_throttle_reload(run);
	}
	return false;
}

/* after a transaction: what this helper has done so far, and to a runner that waits that it has */
void
rm_crew_publish(RmRun *run)
{
	pg_atomic_write_u64(&berth->sums[SUM_TRANSACTIONS], run->transactions);
	pg_atomic_write_u64(&berth->sums[SUM_BATCHES], run->batches);
	pg_atomic_write_u64(&berth->sums[SUM_ROWS_CHANGED], run->rows_changed);
	pg_atomic_write_u64(&berth->sums[SUM_ROWS_HOT], run->rows_hot);
	pg_atomic_write_u64(&berth->sums[SUM_LOCK_RETRIES], run->lock_retries);
	pg_atomic_write_u64(&berth->sums[SUM_WAL_BYTES], pgWalUsage.wal_bytes - run->wal_started);
	wake(segment->runner_pid);
}

/*
 * risky_migrations.help()
 *
 * What a helper calls, at top level, so that it can commit.
 */
Datum
rm_help(PG_FUNCTION_ARGS)
{
	RmRun		run = {0};

	if (berth == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("risky_migrations.help() can be called by a helper only"),
				 errdetail("Helpers are background workers that the runner of a migration asks for."),
				 errhint("SET risky_migrations.workers, then call the step.")));
	rm_procedure_begin(fcinfo, "risky_migrations.help");
	run.migration_id = segment->migration_id;
	run.step_index = segment->step_index;
	run.batch = segment->batch;
	run.log_id = segment->log_id;
	run.helper = berth->number;
	run.aside = segment->aside;
	rm_run_helper(&run);
	rm_procedure_end();
	PG_RETURN_VOID();
}

/* attaches to the segment for as long as this process lives; false if it has gone */
static bool
attach(const HelperOrder *order)
{
	dsm_segment *dsm;

	CurrentResourceOwner = ResourceOwnerCreate(NULL, "risky_migrations helper");
	dsm = dsm_attach(order->handle);
	if (dsm == NULL)
		return false;
	dsm_pin_mapping(dsm);
	segment = dsm_segment_address(dsm);
	if (segment->magic != CREW_MAGIC ||
		segment->berths[order->berth].number != order->number)
		return false;
	berth = &segment->berths[order->berth];
	berth->attached = true;
	return true;
}

/* Entry point of a helper. */
void
rm_helper_main(Datum main_arg)
{
	HelperOrder order;
	MemoryContext context;
	List	   *settings = NIL;
	const char *next;

	memcpy(&order, MyBgworkerEntry->bgw_extra, sizeof(order));
	pqsignal(SIGTERM, die);
	pqsignal(SIGHUP, SignalHandlerForConfigReload);
	BackgroundWorkerUnblockSignals();
	if (!attach(&order))
		return;
	BackgroundWorkerInitializeConnectionByOid(segment->database, segment->session_user,
											  RM_WORKER_CONNECT_FLAGS);

	context = AllocSetContextCreate(TopMemoryContext, "rm helper", ALLOCSET_SMALL_SIZES);
	MemoryContextSwitchTo(context);
	next = segment->settings;
	for (int i = 0; i < segment->nsettings; i++, next += strlen(next) + 1)
		settings = lappend(settings, pstrdup(next));
	if (GetConfigOption("transaction_timeout", true, false) != NULL)
		settings = lappend(settings, "transaction_timeout=0");
	settings = lappend(settings, psprintf("application_name=risky_migrations migration %lld helper %d",
										  (long long) segment->migration_id, order.number));
	PG_TRY();
	{
		rm_worker_become(segment->role, settings, WARNING);
		pg_atomic_write_u32(&berth->connected, 1);
		rm_worker_statement("CALL " RM_SCHEMA ".help()");
		berth->done = true;
	}
	PG_CATCH();
	{
		/* not logged here: the runner raises it, and logs it then */
		ErrorData  *error;

		MemoryContextSwitchTo(context);
		error = CopyErrorData();
		FlushErrorState();
		rm_report_copy(&berth->error, error);
		berth->failed = true;
		debug_query_string = NULL;
		AbortCurrentTransaction();
	}
	PG_END_TRY();
}
