/*-------------------------------------------------------------------------
 *
 * throttle.c
 *	  Holding a migration back for the sake of others.
 *
 * A backfill writes WAL as fast as the machine can.  Standbys, subscribers and
 * the archive have to keep up with it, or the disk fills and a failover takes
 * hours.  So between two transactions of a step, where nothing is held, the
 * runner calls rm_throttle():
 *
 *	the configuration is read again if it was reloaded: a CALL would not see
 *	that before its end, and all settings here can be changed meanwhile
 *
 *	after a batch:  batch_pause
 *
 *	after work that may be held, by one process alone: where it has waited for a
 *	processor, or others for the WAL that it writes in bulk, it rests, busy_rest times as
 *	long.  On a machine with processors to spare that is nothing; where all are busy
 *	the migration would otherwise take the share of one more client, and what clients
 *	do under locks would take longer for all who wait for these.  The operating
 *	system says how long a process has been ready to run and did not (Linux,
 *	/proc/self/schedstat); others do not say, and nothing is rested there.  Helpers
 *	that only make use of a processor with nothing to do (run->aside) rest likewise,
 *	each for itself, and break off their work for it; and where one process copies
 *	it does not rest beside them: they are sent away (run->busy).  What cannot be
 *	interrupted for a rest, the building of an index, does without the processes
 *	that PostgreSQL would have help it (rm_throttle_building).  How long others wait
 *	because of the WAL is estimated: pages that are logged make each fsync of theirs
 *	longer, but who commits waits for the disk anyway
 *
 *	before work that may be held (run->may_hold): while one of these is so,
 *	  replica lag	a walsender's receiver is behind, in bytes or in time
 *	  slot			a replication slot retains more WAL than it may
 *	  archive		more WAL waits to be archived than may
 *	  query			the user's own query says so
 *	the reason is shown in rm_progress, and we rest and look again: first after
 *	50 ms, then after twice that, at last once a second
 *
 * A hold is nothing but time that passes: no lock, no snapshot, no transaction
 * that is older than the last look, and it does not count as a failure.  The
 * reason is written to the step log in a transaction of its own, which waits
 * for no disk and no standby.
 *
 * Which receivers count: all that tell what they have applied, that is standbys,
 * also while they catch up, and logical subscribers.  A base backup, its stream
 * of WAL and pg_receivewal do not, and flush whole segments only: what they need
 * is looked after by their slots.  Read from shared memory, since SQL shows it
 * to monitors only; the reason therefore names a process, and nothing that is
 * not public.
 *
 * Easy to get wrong:
 *
 *	The server measures a lag in time only when the receiver makes progress: of
 *	one that stands still it tells the last value for ever.  So we remember at
 *	which time which position was reached; a receiver that has not yet applied
 *	a position is at least as late as that is old.
 *
 *	A receiver that has applied everything may show an old lag for some time.
 *	It has none.
 *
 *	The user's query can hold us, but not take us along: it runs in a
 *	transaction of its own, read-only, with a limit of time, as the role that
 *	runs the migration; an error in it ends the step (which can be called
 *	again) instead of holding it for ever.  Whoever owns the database could
 *	set it for all roles by ALTER DATABASE, and have it run by a superuser: from
 *	there it is accepted only where the owner could do that anyway.
 *
 *	Autovacuum does not give way when it works against wraparound, so asking
 *	for a lock which it is in the way of would let everybody queue behind us
 *	for nothing, once a try.  rm_lock_relation() looks before it asks, and
 *	rm_throttle_wraparound() waits for the vacuum's end without asking.
 *
 * Copyright (c) 2026, risky_migrations contributors
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <fcntl.h>
#include <limits.h>
#include <unistd.h>

#include "access/xact.h"
#include "access/xlog.h"
#include "access/xlog_internal.h"
#include "catalog/pg_database.h"
#include "catalog/pg_type.h"
#include "compat.h"
#include "executor/spi.h"
#include "miscadmin.h"
#include "portability/instr_time.h"
#include "postmaster/interrupt.h"
#include "replication/slot.h"
#include "replication/walsender.h"
#include "replication/walsender_private.h"
#include "risky_migrations.h"
#include "storage/fd.h"
#include "storage/lwlock.h"
#include "storage/proc.h"
#include "storage/spin.h"
#include "steer.h"
#include "throttle.h"
#include "utils/acl.h"
#include "utils/guc.h"
#include "utils/snapmgr.h"
#include "utils/syscache.h"
#include "utils/timeout.h"
#include "utils/timestamp.h"
#include "utils/wait_event.h"

/* rests between two looks, in milliseconds: the first, and the longest */
#define FIRST_REST 50
#define LONGEST_REST 1000
/* what is not cheap to look at is looked at this often, in milliseconds */
#define EXPENSIVE_LOOK 1000
/* and then at most this part of the time is spent with reading the directory */
#define ARCHIVE_LOOK_SHARE 20
/* positions in the WAL that are remembered; they span twice the longest lag */
#define POSITIONS 64
/* longest reason that is shown */
#define REASON_SIZE 256
/* the part of its time that work has to wait for a processor until it counts */
#define BUSY_SHARE 0.1
/* and at least so many milliseconds, where it could end in the middle */
#define UNWANTED_AFTER 2.0
/* of the time for which others wait for the WAL beside work that writes much, how much counts */
#define WAL_WAIT_SHARE 0.5
/* "of late": the last so many milliseconds of work, none of it as long ago as this */
#define LATELY 1000
#define LONG_AGO 10000

/* settings, see rm_throttle_init() */
static int	batch_pause = 0;	/* ms */
static double busy_rest = 10;
static int	max_replica_lag_bytes = 256 * 1024; /* kB */
static int	max_replica_lag = 60000;	/* ms */
static int	max_slot_retained_wal = 10 * 1024;	/* MB */
static int	max_unarchived_wal = 1024;	/* MB */
static char *throttle_query = NULL;
static int	throttle_query_timeout = 5000;	/* ms */

/* at that time the WAL had been written up to there */
typedef struct Position
{
	XLogRecPtr	lsn;
	TimestampTz at;
} Position;

/* what one run remembers between its looks */
struct RmThrottle
{
	Position	positions[POSITIONS];	/* the oldest first */
	int			npositions;
	TimestampTz archive_next;	/* not to be looked at before */
	int64		archive_ready;	/* segments that waited then */
	TimestampTz query_next;
	bool		query_holds;
	TimestampTz last_notice;
	/* when the work under way began, and how long this process had waited then, ns */
	instr_time	work_began;
	uint64		waited;
	bool		waited_known;
	double		busy_rest_ms;	/* the last rest for others */
	const char *busy_reason;
};

/* what this process has worked of late, and was waited meanwhile by it or by others, ms */
static struct
{
	double		worked;
	double		waited;
	TimestampTz until;
}			lately;

/* looks whether others wait for the WAL, during the work under way, and how often they did */
static int	wal_looks;
static int	wal_waits;

/* why to hold; kind is NULL if there is no reason */
typedef struct Reason
{
	const char *kind;
	char		text[REASON_SIZE];
} Reason;

/*-------------------------------------------------------------------------
 * Settings
 *-------------------------------------------------------------------------
 */

/* once per process, from _PG_init */
void
rm_throttle_init(void)
{
	/* for whom the machine is too busy all the time, whatever the other limits */
	DefineCustomIntVariable("risky_migrations.batch_pause",
							"Rest after each batch of the backfill.", NULL,
							&batch_pause, 0, 0, INT_MAX, PGC_USERSET,
							GUC_UNIT_MS, NULL, NULL, NULL);

	/*
	 * With that, clients that use all processors keep three quarters of their
	 * throughput: bench/run accounts.
	 */
	DefineCustomRealVariable("risky_migrations.busy_rest",
							 "Rest so many times as long as the work had to wait for a processor, or others for its WAL.",
							 "0 does not rest. With several workers nothing is rested. Who waits for a processor is known on Linux only.",
							 &busy_rest, 10, 0, 100, PGC_USERSET, 0, NULL, NULL, NULL);

	/*
	 * A quarter of max_wal_size's default: a standby without a slot still finds
	 * its WAL, and a failover does not take long.
	 */
	DefineCustomIntVariable("risky_migrations.max_replica_lag_bytes",
							"Holds while a standby or subscriber has more WAL than this to apply.",
							"0 does not look at it.",
							&max_replica_lag_bytes, 256 * 1024, 0, INT_MAX,
							PGC_USERSET, GUC_UNIT_KB, NULL, NULL, NULL);

	/* twice max_standby_streaming_delay's default: a query there may delay it */
	DefineCustomIntVariable("risky_migrations.max_replica_lag",
							"Holds while a standby or subscriber is later than this.",
							"0 does not look at it.",
							&max_replica_lag, 60000, 0, INT_MAX, PGC_USERSET,
							GUC_UNIT_MS, NULL, NULL, NULL);

	/* a slot that nobody reads from fills the disk: the worst way to end */
	DefineCustomIntVariable("risky_migrations.max_slot_retained_wal",
							"Holds while a replication slot retains more WAL than this.",
							"0 does not look at it.",
							&max_slot_retained_wal, 10 * 1024, 0, INT_MAX,
							PGC_USERSET, GUC_UNIT_MB, NULL, NULL, NULL);

	/* and so does an archive that does not take any more */
	DefineCustomIntVariable("risky_migrations.max_unarchived_wal",
							"Holds while more WAL than this waits to be archived.",
							"0 does not look at it.",
							&max_unarchived_wal, 1024, 0, INT_MAX, PGC_USERSET,
							GUC_UNIT_MB, NULL, NULL, NULL);

	/* anything else: load, hours of the day, a table with a switch in it */
	DefineCustomStringVariable("risky_migrations.throttle_query",
							   "Holds while the first column of this query's first row is true.",
							   "It runs as the role that runs the migration, read-only, at most once a second.",
							   &throttle_query, "", PGC_USERSET, 0, NULL, NULL,
							   NULL);

	DefineCustomIntVariable("risky_migrations.throttle_query_timeout",
							"Longest time that throttle_query may take.",
							"After it the step ends with an error.",
							&throttle_query_timeout, 5000, 1, INT_MAX,
							PGC_USERSET, GUC_UNIT_MS, NULL, NULL, NULL);
}

/* the whole configuration, as at the end of a statement */
static void
reload(void *arg)
{
	ProcessConfigFile(PGC_SIGHUP);
}

/* reads the configuration again if it was reloaded; between two transactions */
ErrorData *
rm_throttle_reload(RmRun *run)
{
	if (!ConfigReloadPending)
		return NULL;
	ConfigReloadPending = false;
	return rm_between(run, reload, NULL);
}

/*-------------------------------------------------------------------------
 * Receivers of the WAL
 *-------------------------------------------------------------------------
 */

#define MEGABYTES(bytes) ((double) (bytes) / (1024 * 1024))

/* has it become time to look again?  If so, the next time is one interval later */
static bool
look_due(TimestampTz *next, int interval_ms)
{
	TimestampTz now = GetCurrentTimestamp();

	if (now < *next)
		return false;
	*next = TimestampTzPlusMilliseconds(now, interval_ms);
	return true;
}

static void
remember_position(RmThrottle *t, XLogRecPtr lsn, TimestampTz now)
{
	Position   *last = t->npositions > 0 ? &t->positions[t->npositions - 1] : NULL;
	int			apart = Max(1, 2 * (max_replica_lag / POSITIONS));

	if (last && (lsn <= last->lsn || !TimestampDifferenceExceeds(last->at, now, apart)))
		return;
	if (t->npositions == POSITIONS)
		memmove(&t->positions[0], &t->positions[1],
				--t->npositions * sizeof(Position));
	t->positions[t->npositions].lsn = lsn;
	t->positions[t->npositions].at = now;
	t->npositions++;
}

/* how late is a receiver that has applied up to there, at least?  In ms */
static double
known_lag(RmThrottle *t, XLogRecPtr applied, TimestampTz now)
{
	for (int i = 0; i < t->npositions; i++)
		if (t->positions[i].lsn > applied)
			return (now - t->positions[i].at) / 1000.0;
	return 0;
}

/* what one walsender knows of its receiver; false if that applies nothing */
static bool
receiver_position(WalSnd *walsnd, int *pid, XLogRecPtr *applied,
				  TimeOffset *lag)
{
	WalSndState state;

	SpinLockAcquire(&walsnd->mutex);
	*pid = walsnd->pid;
	state = walsnd->state;
	*applied = walsnd->apply;
	*lag = walsnd->applyLag;
	SpinLockRelease(&walsnd->mutex);

	return *pid != 0 && !XLogRecPtrIsInvalid(*applied) &&
		state != WALSNDSTATE_STARTUP && state != WALSNDSTATE_BACKUP;
}

static void
look_at_receivers(RmThrottle *t, Reason *reason)
{
	/* what is not flushed yet will have to be applied as well */
	XLogRecPtr	inserted = GetXLogInsertRecPtr();
	TimestampTz now = GetCurrentTimestamp();
	uint64		worst = 0;

	remember_position(t, inserted, now);
	for (int i = 0; i < max_wal_senders; i++)
	{
		int			pid;
		XLogRecPtr	applied;
		TimeOffset	measured;
		uint64		bytes;
		double		ms;

		if (!receiver_position(&WalSndCtl->walsnds[i], &pid, &applied, &measured) ||
			applied >= inserted || inserted - applied <= worst)
			continue;
		bytes = inserted - applied;
		ms = Max(measured / 1000.0, known_lag(t, applied, now));
		if (max_replica_lag_bytes > 0 && bytes > (uint64) max_replica_lag_bytes * 1024)
			snprintf(reason->text, REASON_SIZE,
					 "the receiver of walsender %d has %.1f MB to apply, risky_migrations.max_replica_lag_bytes is %.1f MB",
					 pid, MEGABYTES(bytes), max_replica_lag_bytes / 1024.0);
		else if (max_replica_lag > 0 && ms > max_replica_lag)
			snprintf(reason->text, REASON_SIZE,
					 "the receiver of walsender %d is %.0f s late, risky_migrations.max_replica_lag is %.1f s",
					 pid, ms / 1000, max_replica_lag / 1000.0);
		else
			continue;
		reason->kind = "replica lag";
		worst = bytes;
	}
}

/*-------------------------------------------------------------------------
 * WAL that cannot be removed
 *-------------------------------------------------------------------------
 */

static void
look_at_slots(Reason *reason)
{
	XLogRecPtr	inserted = GetXLogInsertRecPtr();
	uint64		worst = (uint64) max_slot_retained_wal * 1024 * 1024;

	LWLockAcquire(ReplicationSlotControlLock, LW_SHARED);
	for (int i = 0; i < max_replication_slots; i++)
	{
		ReplicationSlot *slot = &ReplicationSlotCtl->replication_slots[i];
		XLogRecPtr	restart;
		bool		retains;

		if (!slot->in_use)
			continue;
		SpinLockAcquire(&slot->mutex);
		restart = slot->data.restart_lsn;
		retains = rm_slot_is_valid(slot) && !XLogRecPtrIsInvalid(restart);
		SpinLockRelease(&slot->mutex);
		if (!retains || inserted <= restart || inserted - restart <= worst)
			continue;
		worst = inserted - restart;
		reason->kind = "slot";
		snprintf(reason->text, REASON_SIZE,
				 "replication slot \"%s\" retains %.1f MB of WAL, risky_migrations.max_slot_retained_wal is %d MB",
				 NameStr(slot->data.name), MEGABYTES(worst), max_slot_retained_wal);
	}
	LWLockRelease(ReplicationSlotControlLock);
}

/* segments that wait for the archiver */
static int64
count_ready(void)
{
	const char *path = XLOGDIR "/archive_status";
	DIR		   *dir = AllocateDir(path);
	struct dirent *entry;
	int64		ready = 0;

	while ((entry = ReadDirExtended(dir, path, LOG)) != NULL)
		if (strlen(entry->d_name) == XLOG_FNAME_LEN + strlen(".ready") &&
			strcmp(entry->d_name + XLOG_FNAME_LEN, ".ready") == 0)
			ready++;
	if (dir)
		FreeDir(dir);
	return ready;
}

static void
look_at_archive(RmThrottle *t, Reason *reason)
{
	double		mb;

	if (look_due(&t->archive_next, EXPENSIVE_LOOK))
	{
		instr_time	started;
		double		ms;

		INSTR_TIME_SET_CURRENT(started);
		t->archive_ready = count_ready();
		ms = rm_elapsed_ms(started);
		if (ms * ARCHIVE_LOOK_SHARE > EXPENSIVE_LOOK)
			t->archive_next = TimestampTzPlusMilliseconds(GetCurrentTimestamp(),
														  (int64) (ms * ARCHIVE_LOOK_SHARE));
	}
	mb = MEGABYTES((double) t->archive_ready * wal_segment_size);
	if (mb <= max_unarchived_wal)
		return;
	reason->kind = "archive";
	snprintf(reason->text, REASON_SIZE,
			 "%.0f MB of WAL wait to be archived, risky_migrations.max_unarchived_wal is %d MB",
			 mb, max_unarchived_wal);
}

/*-------------------------------------------------------------------------
 * The user's query
 *-------------------------------------------------------------------------
 */

/* may what the database's owner has set for all be run by this role? */
static void
check_query_source(void)
{
	int			n;
	struct config_generic **variables = rm_guc_variables(&n);
	GucSource	source = PGC_S_DEFAULT;
	HeapTuple	tup;
	Oid			owner;

	for (int i = 0; i < n; i++)
		if (strcmp(variables[i]->name, "risky_migrations.throttle_query") == 0)
			source = variables[i]->source;
	if (source != PGC_S_DATABASE)
		return;
	tup = SearchSysCache1(DATABASEOID, ObjectIdGetDatum(MyDatabaseId));
	if (!HeapTupleIsValid(tup))
		elog(ERROR, "cache lookup failed for database %u", MyDatabaseId);
	owner = ((Form_pg_database) GETSTRUCT(tup))->datdba;
	ReleaseSysCache(tup);
	if (owner != GetUserId() && !superuser_arg(owner))
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
				 errmsg("it was set by ALTER DATABASE, whose owner is another role")));
}

/* a call of the query */
typedef struct QueryCall
{
	bool		holds;
	bool		timed_out;
} QueryCall;

/* runs the query; the caller's transaction is its own */
static int
execute_query(QueryCall *call)
{
	char	   *query = pstrdup(throttle_query);	/* it might change it */
	volatile int rc = 0;

	PushActiveSnapshot(GetTransactionSnapshot());
	enable_timeout_after(STATEMENT_TIMEOUT, throttle_query_timeout);
	PG_TRY();
	{
		rc = SPI_execute(query, true, 1);
		/* one that has fired by now must not hit somebody else */
		disable_timeout(STATEMENT_TIMEOUT, true);
		if (get_timeout_indicator(STATEMENT_TIMEOUT, false))
		{
			call->timed_out = true;
			CHECK_FOR_INTERRUPTS();
		}
	}
	PG_CATCH();
	{
		call->timed_out |= get_timeout_finish_time(STATEMENT_TIMEOUT) <= GetCurrentTimestamp();
		disable_timeout(STATEMENT_TIMEOUT, true);
		if (get_timeout_indicator(STATEMENT_TIMEOUT, true))
			QueryCancelPending = false;
		PG_RE_THROW();
	}
	PG_END_TRY();
	PopActiveSnapshot();
	pfree(query);
	return rc;
}

static void
ask_query(void *arg)
{
	QueryCall  *call = arg;
	bool		isnull;

	rm_lock_bound_waits();
	check_query_source();
	XactReadOnly = true;		/* until the end of the subtransaction */
	if (execute_query(call) != SPI_OK_SELECT)
		ereport(ERROR,
				(errcode(ERRCODE_SYNTAX_ERROR),
				 errmsg("it is not one SELECT")));
	if (SPI_tuptable->tupdesc->natts < 1 || SPI_gettypeid(SPI_tuptable->tupdesc, 1) != BOOLOID)
		ereport(ERROR,
				(errcode(ERRCODE_DATATYPE_MISMATCH),
				 errmsg("its first column is not of type boolean")));
	if (SPI_processed > 0)
	{
		Datum		value = SPI_getbinval(SPI_tuptable->vals[0],
										  SPI_tuptable->tupdesc, 1, &isnull);

		call->holds = !isnull && DatumGetBool(value);
	}
}

/* the same error, saying whose it is and what to do */
static ErrorData *
explain_query_error(RmRun *run, QueryCall *call, ErrorData *error)
{
	MemoryContext oldcxt;

	if (error->sqlerrcode == ERRCODE_QUERY_CANCELED && !call->timed_out)
		return error;			/* somebody has cancelled the migration */
	oldcxt = MemoryContextSwitchTo(run->cxt);
	if (error->sqlerrcode == ERRCODE_QUERY_CANCELED)
		error->message = psprintf("risky_migrations.throttle_query did not end within %d ms",
								  throttle_query_timeout);
	else
		error->message = psprintf("risky_migrations.throttle_query failed: %s",
								  error->message);
	if (error->detail == NULL)
		error->detail = psprintf("The query is: %s", throttle_query);
	error->hint = pstrdup("Nothing of the step is lost. Correct the setting, or empty it to do without, then call the step again.");
	MemoryContextSwitchTo(oldcxt);
	return error;
}

static ErrorData *
look_at_query(RmRun *run, Reason *reason)
{
	RmThrottle *t = run->throttle;

	if (GetCurrentTimestamp() >= t->query_next)
	{
		QueryCall	call = {0};
		ErrorData  *error = rm_between(run, ask_query, &call);

		if (error)
			return explain_query_error(run, &call, error);
		t->query_holds = call.holds;
		t->query_next = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), EXPENSIVE_LOOK);
	}
	if (t->query_holds)
	{
		reason->kind = "query";
		strlcpy(reason->text, "risky_migrations.throttle_query says so", REASON_SIZE);
	}
	return NULL;
}

/*-------------------------------------------------------------------------
 * Holding
 *-------------------------------------------------------------------------
 */

/* is there a reason to hold?  Cheap ones first; the error of the query */
static ErrorData *
look(RmRun *run, Reason *reason)
{
	RmThrottle *t = run->throttle;

	reason->kind = NULL;
	if (max_replica_lag_bytes > 0 || max_replica_lag > 0)
		look_at_receivers(t, reason);
	if (reason->kind == NULL && max_slot_retained_wal > 0)
		look_at_slots(reason);
	if (reason->kind == NULL && max_unarchived_wal > 0 && XLogArchivingActive())
		look_at_archive(t, reason);
	if (reason->kind == NULL && throttle_query && throttle_query[0] != '\0')
		return look_at_query(run, reason);
	return NULL;
}

/* is a vacuum against wraparound in the way of the lock that was asked for? */
static ErrorData *
look_at_vacuum(RmRun *run, Reason *reason)
{
	int			pid = rm_wraparound_vacuum(run->locks.vacuumed);

	reason->kind = pid ? "wraparound vacuum" : NULL;
	if (pid)
		snprintf(reason->text, REASON_SIZE,
				 "autovacuum (process %d) works on %s to prevent wraparound", pid,
				 run->relation);
	return NULL;
}

/* may a notice about holding be sent?  At most one a second */
static bool
notice_due(RmThrottle *t)
{
	return look_due(&t->last_notice, 1000);
}

/* rests until no reason is found any more; an error, also a cancel, ends it */
static ErrorData *
hold_while(RmRun *run, ErrorData *(*find_reason) (RmRun *run, Reason *reason))
{
	Reason		reason;
	char		shown[REASON_SIZE] = "";
	bool		told = false;
	int			rest_ms = FIRST_REST;
	instr_time	started;
	ErrorData  *error;

	INSTR_TIME_SET_CURRENT(started);
	while ((error = find_reason(run, &reason)) == NULL && reason.kind)
	{
		/* what has been committed without waiting for the disk goes out now */
		if (shown[0] == '\0')
			XLogFlush(XactLastCommitEnd);
		if (shown[0] == '\0' && notice_due(run->throttle))
		{
			ereport(NOTICE,
					(errmsg("step %s holds: %s", run->step->name, reason.text)));
			told = true;
		}
		if (strcmp(shown, reason.text) != 0)
		{
			strlcpy(shown, reason.text, REASON_SIZE);
			error = rm_show_wait(run, reason.kind, reason.text);
		}
		if (error == NULL)
			error = rm_rest(run, rest_ms);
		if (error == NULL)
			error = rm_throttle_reload(run);
		/* a pause or a cancellation is obeyed by the next transaction */
		if (error || rm_steer_wanted(run) != RM_WANT_RUN)
			break;
		rest_ms = Min(2 * rest_ms, LONGEST_REST);
	}
	if (shown[0] != '\0' && error == NULL)
	{
		error = rm_show_wait(run, NULL, NULL);
		if (told && notice_due(run->throttle))
			ereport(NOTICE,
					(errmsg("step %s goes on after %.1f s", run->step->name,
							rm_elapsed_ms(started) / 1000)));
	}
	return error;
}

/*
 * How long this process was ready to run so far and had no processor, in
 * nanoseconds; false if the operating system does not tell.
 */
static bool
time_waited_for_processor(uint64 *ns)
{
	static int	fd = -2;		/* -1: there is no such file */
	char		text[128];
	int			len;

	if (fd == -2)
	{
		fd = BasicOpenFile("/proc/self/schedstat", O_RDONLY | PG_BINARY);
		if (fd < 0)
			fd = -1;
	}
	if (fd < 0 || (len = pread(fd, text, sizeof(text) - 1, 0)) <= 0)
		return false;
	text[len] = '\0';
	return sscanf(text, "%*u " UINT64_FORMAT, ns) == 1;
}

/* work that may be held begins */
static void
note_work_begins(RmThrottle *t)
{
	t->waited_known = busy_rest > 0 && time_waited_for_processor(&t->waited);
	wal_looks = wal_waits = 0;
	INSTR_TIME_SET_CURRENT(t->work_began);
}

/*
 * During work that writes much WAL, now and then: does another backend wait for WAL to
 * get to the disk?  Read without a lock, as pg_stat_activity does.
 */
void
rm_throttle_look_at_wal(void)
{
	if (busy_rest == 0)
		return;
	wal_looks++;
	for (int i = 0; i < MaxBackends; i++)
	{
		PGPROC	   *proc = &ProcGlobal->allProcs[i];
		uint32		event = proc->wait_event_info;

		if (proc != MyProc &&
			(event == WAIT_EVENT_WAL_SYNC || event == WAIT_EVENT_WAL_WRITE ||
			 event == (PG_WAIT_LWLOCK | WALWriteLock->tranche)))
		{
			wal_waits++;
			break;
		}
	}
}

/*
 * Such work ends: for how many milliseconds to rest, since it had to wait for a
 * processor, or others for its WAL; 0 if that is not known, or not worth it.
 */
static double
rest_for_others(RmThrottle *t)
{
	TimestampTz now = GetCurrentTimestamp();
	double		worked_ms;
	double		waited_ms = 0;
	double		wal_ms = 0;
	uint64		waited;
	double		rest_ms;

	if (busy_rest == 0 || INSTR_TIME_IS_ZERO(t->work_began))
		return 0;
	worked_ms = rm_elapsed_ms(t->work_began);
	if (t->waited_known && time_waited_for_processor(&waited))
		waited_ms = (waited - t->waited) / 1e6;
	if (wal_looks > 0)
		wal_ms = worked_ms * WAL_WAIT_SHARE * wal_waits / wal_looks;
	t->busy_reason = wal_ms < BUSY_SHARE * worked_ms ? "others use the processors" :
		waited_ms < BUSY_SHARE * worked_ms ? "others wait for the WAL" :
		"others use the processors, and wait for the WAL";
	waited_ms = Max(waited_ms, wal_ms);
	if (TimestampDifferenceExceeds(lately.until, now, LONG_AGO + (int) Min(worked_ms, INT_MAX / 2)))
		lately.worked = lately.waited = 0;
	lately.worked += worked_ms;
	lately.waited += waited_ms;
	if (lately.worked > LATELY)
	{
		lately.waited *= LATELY / lately.worked;
		lately.worked = LATELY;
	}
	lately.until = now;
	if (waited_ms < BUSY_SHARE * worked_ms)
		return 0;
	rest_ms = Min(waited_ms * busy_rest, LONGEST_REST);
	return rest_ms < 1 ? 0 : rest_ms;
}

/*
 * Had this process to wait for a processor of late, or others for its WAL?  False also if
 * that is not known, or not to be taken into account (busy_rest is 0).
 */
static bool
others_are_busy(void)
{
	return busy_rest > 0 && lately.waited > 0 && lately.waited >= BUSY_SHARE * lately.worked;
}

/*
 * For the rest of the transaction: indexes are built by one process where others are
 * busy, since it cannot rest meanwhile.  Not if several workers are allowed anyway.
 */
void
rm_throttle_building(void)
{
	if (rm_workers == 1 && others_are_busy())
		(void) set_config_option("max_parallel_maintenance_workers", "0", PGC_USERSET,
								 PGC_S_SESSION, GUC_ACTION_LOCAL, true, 0, false);
}

/* rests after such work if it was at the cost of others */
static ErrorData *
rest_if_busy(RmRun *run)
{
	RmThrottle *t = run->throttle;

	t->busy_rest_ms = 0;
	if (run->helpers > 0 && !run->aside)
		return NULL;
	t->busy_rest_ms = rest_for_others(t);
	if (run->helpers > 0)
	{
		/* it may be they who take it from us: they go first, and not for one instant */
		run->busy = others_are_busy();
		t->busy_rest_ms = 0;
	}
	return t->busy_rest_ms == 0 ? NULL : rm_rest(run, (int) t->busy_rest_ms);
}

/* rests after a batch, for as long as the setting says at each moment */
static ErrorData *
pause_after_batch(RmRun *run)
{
	instr_time	started;
	ErrorData  *error = NULL;

	INSTR_TIME_SET_CURRENT(started);
	while (error == NULL)
	{
		double		left = batch_pause - rm_elapsed_ms(started);

		if (left <= 0 || rm_steer_wanted(run) != RM_WANT_RUN)
			break;
		error = rm_rest(run, (int) Max(1, left));
		if (error == NULL)
			error = rm_throttle_reload(run);
	}
	return error;
}

static void
prepare(RmRun *run)
{
	if (run->throttle == NULL)
		run->throttle = MemoryContextAllocZero(run->cxt, sizeof(RmThrottle));
}

/*
 * Between two transactions of a step: reads the configuration again if asked
 * to, and rests for as long as there is a reason.  Returns the error that ends
 * the step (a cancel, the user's query), rolled back, or NULL.
 */
ErrorData *
rm_throttle(RmRun *run)
{
	ErrorData  *error = rm_throttle_reload(run);

	prepare(run);
	if (error == NULL && run->batch_ended)
		error = pause_after_batch(run);
	if (error == NULL && run->may_hold)
		error = rest_if_busy(run);
	if (error == NULL && run->may_hold)
		error = hold_while(run, look);
	note_work_begins(run->throttle);
	return error;
}

/*
 * The same in a helper aside, which makes use only of a processor that nobody else wants,
 * the process beside which it works included: before, and after its transaction.  The
 * latter sets run->idle_until.
 */
void
rm_throttle_aside_begins(RmRun *run)
{
	prepare(run);
	note_work_begins(run->throttle);
}

void
rm_throttle_aside_ends(RmRun *run)
{
	run->idle_until = TimestampTzPlusMilliseconds(GetCurrentTimestamp(),
												  (int) rest_for_others(run->throttle));
}

/*
 * In the middle of it: is its processor wanted by others, so that it should end here?  Its
 * rest is then short too, and it is soon there when a processor has nothing to do.
 */
bool
rm_throttle_aside_unwanted(RmRun *run)
{
	RmThrottle *t = run->throttle;
	uint64		waited;

	return t->waited_known && time_waited_for_processor(&waited) &&
		(waited - t->waited) / 1e6 >= Max(UNWANTED_AFTER, BUSY_SHARE * rm_elapsed_ms(t->work_began));
}

/*
 * After rm_lock_relation() has refused to ask for a lock because of a vacuum
 * against wraparound (locks.vacuumed): waits for its end, likewise.
 */
ErrorData *
rm_throttle_wraparound(RmRun *run)
{
	prepare(run);
	return hold_while(run, look_at_vacuum);
}

/*
 * Why the runner will rest after a batch, or NULL if it will not.  Whether there will be
 * a processor for it is not known before; it is told of the one before.
 */
const char *
rm_batch_pause_reason(const RmRun *run)
{
	if (batch_pause > 0)
		return psprintf("risky_migrations.batch_pause is %d ms", batch_pause);
	if (run->throttle && run->throttle->busy_rest_ms >= 1)
		return psprintf("%s: it has rested for %.0f ms, since risky_migrations.busy_rest is %g",
						run->throttle->busy_reason, run->throttle->busy_rest_ms, busy_rest);
	return NULL;
}
